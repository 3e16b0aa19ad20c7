"""Many devices and processes: what lies where, what is sent, and how processes agree."""
