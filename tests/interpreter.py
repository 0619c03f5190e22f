"""Triton 3.6's interpreter beside NumPy 2.4, which makes no int of a one-element array; loop bounds need one."""

from triton.runtime import interpreter


def mend() -> None:
    """Give the interpreter's tensors an ``__index__``; once is enough."""
    patch = interpreter._patch_lang_tensor
    if getattr(patch, "mended", False):
        return

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.mended = True
    interpreter._patch_lang_tensor = patched
