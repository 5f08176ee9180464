"""Published functions of Git Re-Basin in PyTorch and the same by nlm, each a whole process.

They are in no package: ``--checkout`` is a clone of github.com/themrzmaster/git-re-basin-pytorch.
Two networks drawn apart, one brought into the other's order: time, peak memory, and the inner
product of the parameters that was reached.

    python benchmarks/host_git_rebasin.py --checkout DIR [--rows NETWORK ...] [--repeat N]
"""

from _rebasin import NETWORKS, SIZES, build
from _whole_processes import arguments, from_checkout, main


def parameters(network: str, size: str) -> dict[str, int]:
    return {"parameters": sum(x.numel() for x in build(network, size)[0].parameters())}


HOST = from_checkout("git_rebasin", "git-re-basin-pytorch", NETWORKS, parameters)

if __name__ == "__main__":
    parser = arguments(HOST, __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    main(HOST, parser.parse_args())
