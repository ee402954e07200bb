import hwfuse


@hwfuse.hookimpl
def hwfuse_backend():
    return hwfuse.Backend("acme", "hwfuse_acme", vendor=None, providers={"index": ()})
