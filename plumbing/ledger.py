"""Tensors that have a shape and no values, and the bytes that they would take."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """While it is entered, floating-point tensors are fake, and others real, since shapes depend on
    them.

    live: bytes of all tensors made under it; peaks: {section: the most that were live in it}
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live, self.section, self.peaks = 0, "", {}
        self.sizes = weakref.WeakKeyDictionary()  # storage -> [its bytes]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind not in (FakeTensor, torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a DTensor: what it does to its shard comes by here again
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if device_of(tensors, kwargs) == "meta":  # has no memory anyway
            return func(*args, **kwargs)
        unreal = any(isinstance(x, FakeTensor) or x.is_floating_point() for x in tensors)
        if unreal and func is aten._local_scalar_dense.default:
            return 1.0  # a gradient norm, or a sum of metrics
        if unreal and func is aten.index.Tensor:  # how many are true is known: masks are real
            args = (args[0], [i for mask in args[1] for i in places(mask)])
        out = self.run(func, args, kwargs, unreal, bool(tensors))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage not in self.sizes:
                    self.sizes[storage] = size = [0]
                    weakref.finalize(storage, self.resized, size, 0)
                    self.resized(size, storage.nbytes())
        return out

    def run(self, func, args, kwargs, unreal, given):
        """Floating-point results are fake, others real. given: has it tensors to start from?"""
        if not unreal and (given or func.namespace != "aten"):
            return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        if unreal or (isinstance(out, torch.Tensor) and out.is_floating_point()):
            return out
        return func(*args, **kwargs)

    def resized(self, size, now):
        self.live += now - size[0]
        size[0] = now
        self.peaks[self.section] = max(self.live, self.peaks.get(self.section, 0))

    def __enter__(self):
        self.resize = resize = torch.UntypedStorage.resize_  # FSDP2 frees whole weights by it

        def resize_(storage, n):
            out = resize(storage, n)
            if storage in self.sizes:
                self.resized(self.sizes[storage], n)
            return out

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)


def device_of(tensors, kwargs):
    """The kind of device that an operation works for."""
    device = kwargs.get("device") or (tensors[0].device if tensors else "cpu")
    return torch.device(device).type


def places(index):
    """A mask as the indices of what it selects; any other index as it is."""
    return index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]


class Attend(torch.autograd.Function):
    """The memory of a fused attention kernel: its inputs, its output and one float32 a query are
    kept for the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def stand_in(module, query, key, value, attention_mask, **_):
    """As transformers calls attention: (rows, heads, S, d) -> ((rows, S, heads, d), None)"""
    return Attend.apply(query, key, value).transpose(1, 2).contiguous(), None
