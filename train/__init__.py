"""A sharded transformer trainer in which `attention = nsa | full | window` is one flag."""
