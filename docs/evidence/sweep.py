"""The grid of stale-views.md: balancers x age of reports x check x arrivals, at two loads.

    python3 docs/evidence/sweep.py FOREBAY TRACE [--seeds 2] > docs/evidence/stale-sweep.json

FOREBAY is a release build. The loads are those at which one balancer with a fresh view keeps 90 % and 99 % of
all requests (fleet-conversation.json); each cell has the shares that are kept there. Progress goes to stderr.
"""

import argparse
import itertools
import json
import subprocess
import sys

BALANCERS = (1, 2, 8, 32)
STALENESS_MS = (20, 50, 250, 1000)
CHECKS = ("nothing", "veto", "ask", "ask-first", "reserve")
LOADS = {"jitter": (6.08, 5.57), "burst": (6.01, 5.20)}
LOSSES = (0.1, 0.3)


def kept(command, rate):
    ran = subprocess.run([*command, "--rate", str(rate)], check=True, stdout=subprocess.PIPE)
    (policy,) = json.loads(ran.stdout)["policies"].values()
    return policy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forebay")
    parser.add_argument("trace")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    fixed = [args.forebay, "sim", "fleet", "--trace", args.trace, "--policies", "forebay", "--output", "json"]
    fixed += ["--seeds", str(args.seeds)]

    grid = [(1, 0, "ask", arrivals, 0) for arrivals in LOADS]
    grid += [(*cell, 0) for cell in itertools.product(BALANCERS, STALENESS_MS, CHECKS, LOADS)]
    grid += [(8, 250, check, "jitter", loss) for check in CHECKS for loss in LOSSES]
    cells = []
    for number, (balancers, staleness_ms, check, arrivals, loss) in enumerate(grid, 1):
        command = fixed + ["--balancers", str(balancers), "--staleness-ms", str(staleness_ms), "--check", check]
        command += [f"--{arrivals}", "--report-loss", str(loss)]
        at90, at99 = (kept(command, rate) for rate in LOADS[arrivals])
        cells.append(
            {
                "balancers": balancers,
                "staleness_ms": staleness_ms,
                "check": check,
                "arrivals": arrivals,
                "report_loss": loss,
                "kept_at_90": round(at90["attainment"], 4),
                "kept_at_99": round(at99["attainment"], 4),
                "hit_ratio": round(at90["hit_ratio"], 4),
                "unseen": round(at90["unseen_arrivals"], 3),
                "refused": round(at90["refusals"], 3),
                "asked": round(at90["questions"], 2),
            }
        )
        print(f"{number} of {len(grid)}: {cells[-1]}", file=sys.stderr, flush=True)
    json.dump({"trace": args.trace.rsplit("/", 1)[-1], "seeds": args.seeds, "rates": LOADS, "cells": cells}, sys.stdout, indent=1)


main()
