"""The Pallas Mosaic GPU kernels (Hopper and later) behind the common interface. Interpreted where there is no GPU."""


def _missing(op: str):
    def unsupported(*args, **kwargs):
        raise NotImplementedError(f"implementation = 'mosaic': there is no {op} kernel yet")

    return unsupported


compressed_attention = _missing("compressed_attention")
select_blocks = _missing("select_blocks")
selected_attention = _missing("selected_attention")
window_attention = _missing("window_attention")
decode_attention = _missing("decode_attention")
