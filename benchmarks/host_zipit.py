"""ZipIt's matching functions and nlm's, each a whole process.

They are in no package: ``--checkout`` is a clone of github.com/gstoica27/ZipIt. Of two models whose
units are the same but for noise, in another order, the covariance is matched with alpha = beta = 1:
time, peak memory, and the mean correlation of units that became one.

    python benchmarks/host_zipit.py --checkout DIR [--rows FUNCTION ...] [--repeat N]
"""

from _whole_processes import arguments, from_checkout, main

HOST = from_checkout("zipit", "ZipIt", ("permute", "zip"), lambda row, size: {"units": int(size)})

if __name__ == "__main__":
    parser = arguments(HOST, __doc__)
    parser.add_argument("--size", default="768", help="units of each model")
    main(HOST, parser.parse_args())
