"""Random calls of the operators, right and wrong ones: ``python tests/fuzz.py --calls 1000``.

Each call is a right one in which up to two arguments were exchanged for something else: another
shape, dtype, stride, list, number, or none at all.  It may raise one of ERRORS or give a result;
what a public function gives is compared with the reference.  A crash ends the process, so whoever
runs this looks at the exit status.  With --guard every tensor that goes in ends at a page that
nobody may touch, so that reading past an end is a crash, too.
"""

import argparse
import ctypes
import mmap
import random
import warnings

import torch

import vsod_ops
from vsod_ops import backends

ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError)
RAW = torch.ops.vsod_ops
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.int32]
NUMBERS = [0, -1, 1, 2, 3, 7, 10**5, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1]
FLOATS = [0.0, -1.0, 1.0, 1e-30, 1e30, 1e300, float("inf"), float("-inf"), float("nan"), -1e-3]

_libc = ctypes.CDLL(None, use_errno=True)
_guards: list = []


def guarded(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that ends at a page which may not be touched."""
    count = x.numel() * x.element_size()
    if x.device.type != "cpu" or x.layout != torch.strided or not 0 < count < 2**24:
        return x
    pages = -(-count // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    last = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    if _libc.mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    _guards.append(region)
    start = pages * mmap.PAGESIZE - count
    flat = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=start)
    return flat.copy_(x.reshape(-1)).view(x.shape)


class Fuzzer:
    """Draws calls; `guard`: what goes in is guarded."""

    def __init__(self, seed: int, guard: bool):
        self.random = random.Random(seed)
        self.guard = guard
        self.calls = self.errors = self.results = self.compared = 0
        torch.manual_seed(seed)

    # ---- arguments

    def randn(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        choice = self.random.random()
        if choice < 0.1 and x.dim() > 1:  # transposed in memory
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif choice < 0.15 and x.dim() > 1:
            x = torch.randn(shape[1:], dtype=torch.float64).to(dtype).expand(shape)
        elif choice < 0.2 and x.numel():
            x = torch.stack([x, x], -1)[..., 0]
        return x

    def wrong_tensor(self, x):
        """Something in the place of a tensor."""
        r = self.random
        if not isinstance(x, torch.Tensor):
            return torch.randn(r.randrange(5))
        kind = r.randrange(11)
        if kind == 0:
            return x.to(r.choice(DTYPES + OTHER_DTYPES))
        if kind == 1 and x.dim():
            d = r.randrange(x.dim())
            return x.narrow(d, 0, max(0, x.shape[d] - 1))
        if kind == 2 and x.dim():
            return x.repeat_interleave(r.choice([0, 2, 3]), r.randrange(x.dim()))
        if kind == 3:
            return x.unsqueeze(0)
        if kind == 4 and x.dim():
            return x.select(0, 0) if x.shape[0] else x.reshape(-1)
        if kind == 5:
            return x.new_empty([r.choice([0, 1, 2, 5]) for _ in range(r.randrange(6))]).fill_(1)
        if kind == 6:
            return x.transpose(-1, -2) if x.dim() > 1 else x.flatten()[:0]
        if kind == 7:
            return x.flatten()
        if kind == 8:
            return x.to("meta")
        if kind == 9 and x.dim() and x.shape[0]:
            return x.narrow(0, 0, 1).expand(2**10, *x.shape[1:])
        return None

    def wrong_number(self, x):
        r = self.random
        if isinstance(x, float):
            return r.choice(FLOATS)
        if isinstance(x, bool):
            return not x
        return r.choice([*NUMBERS, None, 1.5, "2"])

    def wrong(self, x):
        r = self.random
        if isinstance(x, (tuple, list)):
            x = list(x)
            kind = r.randrange(5)
            if kind == 0 or not x:
                return x[:-1]
            if kind == 1:
                return x + x[-1:]
            if kind == 2:
                return []
            i = r.randrange(len(x))
            x[i] = self.wrong(x[i])
            return x
        if isinstance(x, torch.Tensor):
            return self.wrong_tensor(x)
        if x is None:
            return self.wrong_tensor(None)
        if isinstance(x, (int, float)):
            return self.wrong_number(x)
        return r.choice([None, 0, "x"])

    def hold(self, x):
        if isinstance(x, torch.Tensor):
            dense = x.is_contiguous() or x.numel() == 0
            return guarded(x) if self.guard and dense else x
        if isinstance(x, (tuple, list)):
            return type(x)(map(self.hold, x))
        return x

    # ---- calls

    def run(self, function, arguments: list, keywords: dict | None = None):
        """One call with some arguments made wrong; gives its result, None without numbers."""
        r = self.random
        changes = r.choice([0, 1, 1, 1, 2])
        for _ in range(changes):
            i = r.randrange(len(arguments))
            arguments[i] = self.wrong(arguments[i])
        self.calls += 1
        self.arguments = self.hold(arguments)
        try:
            result = function(*self.arguments, **(keywords or {}))
        except ERRORS:
            if not changes:
                raise
            self.errors += 1
            return None
        self.results += 1
        first = result[0] if isinstance(result, (tuple, list)) else result
        return None if first.device.type == "meta" else result

    def attention_arguments(self):
        r = self.random
        dtype = r.choice(DTYPES)
        batch, queries, dim = r.randint(1, 3), r.randint(1, 70), r.choice([1, 3, 8, 17, 32, 64])
        heads = [r.randint(1, 3) for _ in range(r.randint(1, 3))]
        lengths = [r.choice([1, 5, 31, 64, 100]) for _ in heads]
        q = self.randn(batch, sum(heads), queries, dim, dtype=dtype)
        keys, values = (
            [self.randn(batch, h, n, dim, dtype=dtype) for h, n in zip(heads, lengths, strict=True)]
            for _ in range(2)
        )
        return q, keys, values

    def conv_lstm_arguments(self):
        r = self.random
        dtype = r.choice(DTYPES)
        batch, steps, channels, hidden = r.randint(1, 2), r.randint(1, 3), r.randint(1, 5), 0
        hidden, k = r.randint(1, 5), r.choice([1, 3, 3, 5])
        height, width, dilation = r.randint(1, 20), r.randint(1, 20), r.choice([1, 1, 2, 3, 10**6])
        state = torch.float64 if dtype == torch.float64 else torch.float32

        def maybe(*shape, dtype=dtype):
            return None if r.random() < 0.4 else torch.randn(shape).to(dtype)

        x = self.randn(batch, steps, channels, height, width, dtype=dtype)
        h, c = maybe(batch, hidden, height, width), maybe(batch, hidden, height, width, dtype=state)
        weights = [0.3 * torch.randn(4 * hidden, n, k, k, dtype=dtype) for n in (channels, hidden)]
        peephole = maybe(3, hidden) if r.random() < 0.5 else maybe(3, hidden, height, width)
        return x, h, c, *weights, maybe(4 * hidden), peephole, dilation

    def crf_arguments(self):
        r = self.random
        batch, height, width = r.randint(1, 2), r.randint(1, 20), r.randint(1, 20)
        classes = r.choice([None, None, 2, 5])
        shape = (batch, height, width) if classes is None else (batch, classes, height, width)
        prob = torch.rand(shape)
        if classes:
            prob = prob.softmax(1)
        image = (torch.rand(batch, 3, height, width) * 255).to(r.choice([torch.uint8, torch.float]))
        widths = [r.choice([0.5, 3.0, 60.0]) for _ in range(3)]
        return [prob, image, r.choice([1, 2, 5]), widths[0], 3.0, widths[1], widths[2], 5.0]

    def raw_attention(self):
        q, keys, values = self.attention_arguments()
        self.run(RAW.shunted_attention_cpu, [q, keys, values, 0.3])

    def raw_attention_backward(self):
        q, keys, values = self.attention_arguments()
        out, lse = RAW.shunted_attention_cpu(q, keys, values, 0.3)
        needs = [[self.random.random() < 0.8 for _ in keys] for _ in range(2)]
        grad = self.randn(*out.shape, dtype=out.dtype)
        arguments = [grad, q, keys, values, out, lse, 0.3, self.random.random() < 0.8, *needs]
        self.run(RAW.shunted_attention_backward_cpu, arguments)

    def raw_conv_lstm(self):
        *tensors, dilation = self.conv_lstm_arguments()
        save = self.random.randrange(3)
        if self.random.random() < 0.3:
            arguments = [*tensors, dilation, save, self.random.random() < 0.5]
            self.run(RAW.conv_lstm_cuda_on_host, arguments)
        else:
            self.run(RAW.conv_lstm_cpu, [*tensors, dilation, save])

    def raw_conv_lstm_backward(self):
        *tensors, dilation = self.conv_lstm_arguments()
        save = self.random.choice([1, 2])
        on_host = self.random.random() < 0.3
        if on_host:
            kept = RAW.conv_lstm_cuda_on_host(*tensors, dilation, save, False)
        else:
            kept = RAW.conv_lstm_cpu(*tensors, dilation, save)
        grads = [torch.randn_like(kept[0]), torch.randn_like(kept[1])]
        needs = [self.random.random() < 0.8 for _ in range(7)]
        arguments = [*grads, *tensors, *kept, dilation, needs]
        if on_host:
            self.run(RAW.conv_lstm_backward_cuda_on_host, [*arguments, 0, False])
        else:
            self.run(RAW.conv_lstm_backward_cpu, arguments)

    def raw_activate(self):
        x = torch.randn(self.random.randrange(100), dtype=self.random.choice(DTYPES[:2]))
        self.run(RAW.conv_lstm_activate_cpu, [x])

    def raw_crf(self):
        arguments = self.crf_arguments()
        if self.random.random() < 0.3:
            self.run(RAW.dense_crf_cuda_on_host, [*arguments, 0, False])
        else:
            self.run(RAW.dense_crf_cpu, [*arguments, 0])

    def public_attention(self):
        out = self.run(vsod_ops.shunted_attention, list(self.attention_arguments()))
        if out is not None:
            expected = vsod_ops.shunted_attention(*self.arguments, backend="reference")
            self.compare("shunted_attention", out, expected)

    def public_conv_lstm(self):
        x, h, c, weight_ih, weight_hh, bias, peephole, dilation = self.conv_lstm_arguments()
        state = None if h is None or c is None else (h, c)
        arguments = [x, state, weight_ih, weight_hh, bias, peephole]
        keywords = {"dilation": self.random.choice([dilation, dilation, 10**9, 2**62])}
        out = self.run(vsod_ops.conv_lstm, arguments, keywords)
        if out is not None:
            near = {"dilation": min(keywords["dilation"], 64)}  # beyond the map in any case
            expected = vsod_ops.conv_lstm(*self.arguments, **near, backend="reference")
            self.compare("conv_lstm", out[0], expected[0])

    def public_crf(self):
        prob, image, iterations, *_ = self.crf_arguments()
        result = self.run(vsod_ops.dense_crf, [prob, image], {"iterations": iterations})
        if result is not None and not ((result >= 0) & (result <= 1)).all():
            raise AssertionError("dense_crf: a marginal outside of [0, 1]")

    def compare(self, op: str, result: torch.Tensor, expected: torch.Tensor) -> None:
        self.compared += 1
        tolerance = 3e-2 if result.dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(
            *(result.double(), expected.double()),
            rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda text: f"{op} is not what the reference gives:\n{text}",
        )  # fmt: skip

    def step(self) -> None:
        _guards.clear()
        self.arguments = None
        self.random.choice(
            [
                self.raw_attention, self.raw_attention_backward, self.raw_conv_lstm,
                self.raw_conv_lstm_backward, self.raw_activate, self.raw_crf,
                self.public_attention, self.public_conv_lstm, self.public_crf,
            ]
        )()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guard", action="store_true")
    parser.add_argument("--from-call", type=int, default=0, help="skip to this call of the seed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    module = backends.compiled_module("_cpu")
    if isinstance(module, str):
        raise SystemExit(module)
    totals = [0, 0, 0, 0]
    for call in range(options.from_call, options.calls):
        print(f"call {call}", end="\r", flush=True)
        fuzzer = Fuzzer(options.seed * 10**7 + call, options.guard)
        fuzzer.step()
        counts = (fuzzer.calls, fuzzer.errors, fuzzer.results, fuzzer.compared)
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    print("{} calls: {} errors, {} results, {} compared".format(*totals))


if __name__ == "__main__":
    main()
