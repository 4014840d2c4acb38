"""From results to the figures to reach and the README's table."""

import json
from pathlib import Path
from statistics import median
from typing import Any, Final

MARKS: Final = ("<!-- benchmarks: python -m benchmarks report -->", "<!-- end of benchmarks -->")
OURS: Final = "tombola"
KINDS: Final = {
    "plain": "as one writes it",
    "grouped": "rows grouped by ticket",
    "compiled": "and our compiled tickets",
}
Figures = dict[str, Any]


def at(server: Figures, clients: int, form: str | None = None) -> Figures:
    """The closed loop with so many clients, of a server's first form unless another is named."""
    forms = server["forms"]
    rows = forms[form or next(iter(forms))]["closed"]
    figures: Figures = next(row for row in rows if row["clients"] == clients)
    return figures


def open_at(server: Figures, share: float) -> Figures:
    rows = next(iter(server["forms"].values()))["open"]
    figures: Figures = next(row for row in rows if row["share"] == share)
    return figures


def best_peers(servers: Figures) -> dict[str, Figures]:
    """By kind: the peer that answers most at 32 clients, and its open loop at 80 % of its capacity."""
    best: dict[str, Figures] = {}
    for name, server in servers.items():
        kind, images = server["kind"], at(server, 32)["images_per_s"]
        if kind and images > best.get(kind, {"images_per_s": 0})["images_per_s"]:
            loaded = open_at(server, 0.8)
            best[kind] = {"name": name, "images_per_s": images, "rate": loaded["rate"], "p99_ms": loaded["p99_ms"]}
    return best


def ratios(figures: Figures) -> Figures:
    """The figures to reach, as ratios.

    HTTP over raw, raw over the plain loop, ours over the best peer of each kind, and idle latency over forward times.
    """
    servers = figures["servers"]
    result: Figures = {"raw_over_plain_loop": figures["raw"]["ratio"]}
    if OURS not in servers:
        return result
    mine = at(servers[OURS], 32)
    result["without_http_over_raw"] = round(
        figures["raw"]["without_http_images_per_s"] / figures["raw"]["engine_images_per_s"], 3
    )
    result["http_over_raw_at_32"] = round(mine["images_per_s"] / figures["raw"]["engine_images_per_s"], 3)
    result["idle_p50_over_forwards"] = round(at(servers[OURS], 1)["p50_ms"] / figures["forwards"]["median_sum_ms"], 2)
    result["over_best_peer"] = {
        kind: {
            "peer": peer["name"],
            "images_per_s": round(mine["images_per_s"] / peer["images_per_s"], 2),
            "rate": peer["rate"],
            "p99_ms": equal["p99_ms"],
            "peer_p99_ms": peer["p99_ms"],
        }
        for (kind, peer), equal in zip(best_peers(servers).items(), servers[OURS]["equal"], strict=True)
    }
    return result


def markdown_tables(folder: Path) -> str:
    """Markdown of what is there of compare.json, overload.json, audited.json, soak.json, grpc.json and batch.json."""
    parts = [
        ("compare", describe_comparison),
        ("overload", describe_overload),
        ("audited", describe_audited),
        ("soak", describe_soak),
        ("grpc", describe_grpc),
        ("batch", describe_batch),
    ]
    tables = [
        make(json.loads((folder / f"{name}.json").read_text()))
        for name, make in parts
        if (folder / f"{name}.json").exists()
    ]
    return "\n\n".join(tables)


def describe_comparison(whole: Figures) -> str:
    """Every server in every form, the figures to reach, and the conditions."""
    head = ("server", "images/s at 1", "8", "32", "128 clients", "p50 / p99 ms at 32", "good at 120 %", "MB", "start s")
    rows = [row for name, server in whole["servers"].items() for row in server_rows(name, server)]
    lines = [table_row(head), table_row(("---",) * len(head)), *map(table_row, rows)]
    return "\n".join(
        [*lines, "", *describe_ratios(whole), "", f"{whole['seconds']:g} s a measurement. {describe_conditions(whole)}"]
    )


def server_rows(name: str, server: Figures) -> list[tuple[str, ...]]:
    return [
        (
            f"**{name}** ({form})" if name == OURS else f"{name} ({form})",
            *(f"{at(server, clients, form)['images_per_s']:.0f}" for clients in (1, 8, 32, 128)),
            f"{at(server, 32, form)['p50_ms']:.0f} / {at(server, 32, form)['p99_ms']:.0f}",
            f"{figures['open'][-1]['goodput_per_s']:.0f}",
            f"{server['busy_mb']:.0f}",
            f"{server['start_s']:.1f}",
        )
        for form, figures in server["forms"].items()
    ]


def describe_ratios(whole: Figures) -> list[str]:
    ratio, raw = whole["ratios"], whole["raw"]
    speed, throughput, clients = raw["engine_images_per_s"], raw["without_http_images_per_s"], raw["askers"]
    lines = [f"- raw engine: {speed:.0f} images/s, {ratio['raw_over_plain_loop']:.1f} times the plain loop (3 wanted)"]
    if "over_best_peer" not in ratio:
        return lines
    share = 100 * ratio["without_http_over_raw"]
    lines += [
        f"- {throughput:.0f} images/s for {clients} who wait, without HTTP and decoding: {share:.0f} % of the engine",
        f"- over HTTP at 32 clients: {100 * ratio['http_over_raw_at_32']:.0f} % of the raw engine (85 % wanted)",
        f"- one idle client: p50 is {ratio['idle_p50_over_forwards']:.2f} times its members' forward times (2 at most)",
    ]
    for kind, peer in ratio["over_best_peer"].items():
        wanted = " (3 wanted)" if kind == "plain" else ""
        lines.append(
            f"- the best peer {KINDS[kind]}, {peer['peer']}: ours answers {peer['images_per_s']:.2f} times as many "
            f"images{wanted}; at its {peer['rate']:.0f} images/s p99 is {peer['p99_ms']:.0f} ms against "
            f"{peer['peer_p99_ms']:.0f} ms"
        )
    return lines


def describe_clocks(whole: Figures) -> str:
    """What of the latencies is the generator's, and what the server says."""
    server = whole["by_its_own_clock"]
    share = 100 * server["within_deadline"] / server["answers"]
    late = whole["overload"]["late_p99_ms"]
    return f"{share:.1f} % in time by the server's own clock; the generator sent them {late:.0f} ms late at p99"


def describe_overload(whole: Figures) -> str:
    flood, idle = whole["overload"], whole["idle_p50_ms"]
    sizes = " → ".join(f"{size:.0f}" for size in whole["memory_mb"])
    return (
        f"Overload, {flood['rate']:.0f} images/s for {flood['seconds']:.0f} s, twice the capacity, each with a "
        f"deadline of {1000 * flood['deadline_s']:.0f} ms: {counts(flood['statuses'])}; "
        f"{flood['refused_without_retry_after']} refusals without `Retry-After`; p50 {flood['p50_ms']:.0f} ms, p99 "
        f"{flood['p99_ms']:.0f} ms of what was answered, from the moment a request was due ({describe_clocks(whole)}); "
        f"memory {sizes} MB; {whole['recovery_s']:.2f} s after the last request single images are answered as before "
        f"(p50 {idle['before']:.1f} ms, then {idle['after']:.1f} ms). "
        f"{describe_conditions(whole)}"
    )


def describe_audited(whole: Figures) -> str:
    def three(load: str, figure: str) -> str:
        before, after = (f"{alone[load][figure]:.3g}" for alone in whole["alone"])
        return f"{whole['beside'][load][figure]:.3g} ({before} before, {after} after)"

    audit, rate, share = whole["audit"], whole["rate"], 100 * whole["share_done"]
    return (
        f"Beside an audit ({audit['profile']} on {audit['images']} images, {share:.0f} % of it done): 32 clients "
        f"get {three('many', 'images_per_s')} images/s, p99 {three('many', 'p99_ms')} ms; one client p50 "
        f"{three('one', 'p50_ms')} and p99 {three('one', 'p99_ms')} ms; Poisson arrivals at half of the capacity, "
        f"{rate:.0f} images/s, p50 {three('open', 'p50_ms')} and p99 {three('open', 'p99_ms')} ms. "
        + describe_conditions(whole)
    )


def describe_soak(whole: Figures) -> str:
    return (
        f"Soak, {whole['seconds'] / 60:.0f} minutes at {whole['rate']:.0f} images/s beside 200 slow senders, hang-ups, "
        f"nonsense, requests of 100 images, and the library swapped every minute: {counts(whole['statuses'])}; p50 "
        f"{whole['p50_ms']:.0f} ms, p99 {whole['p99_ms']:.0f} ms; beside it {counts(whole['beside'])}; memory grows by "
        f"{whole['memory_mb_per_hour']:.0f} MB an hour; afterwards {whole['left']['queue_depth']:.0f} rows queued, "
        f"{whole['left']['in_flight']:.0f} requests and {whole['left']['held_bytes']:.0f} bytes held, "
        f"{whole['open_files']['before']} → {whole['open_files']['after']} open files, "
        f"{whole['after_mb']:,.0f} MB. {describe_conditions(whole)}"
    )


def describe_grpc(whole: Figures) -> str:
    """A line for each form of request."""
    lines = []
    for form, figures in whole["forms"].items():
        http, grpc, shares = figures["http"], figures["grpc"], figures["of_rounds"]
        lines.append(
            f"one {form} a request, {http['images_per_s']:.0f} images/s over HTTP and {grpc['images_per_s']:.0f} over "
            f"gRPC, {http['cpu_ms']:.2f} and {grpc['cpu_ms']:.2f} ms of processor time an image; gRPC is at "
            f"{100 * figures['grpc_over_http']:.0f} % of HTTP ({100 * min(shares):.0f} to {100 * max(shares):.0f})"
        )
    return (
        f"gRPC beside HTTP, {whole['clients']} clients of h2load, {len(whole['rounds'])} rounds in turn, medians: "
        f"{'; '.join(lines)}. {describe_load(whole)}{describe_conditions(whole)}"
    )


def describe_batch(whole: Figures) -> str:
    """Medians of the rounds. What listing and finishing cost is in the command's processor time."""

    def middle(name: str, figure: str) -> float:
        return float(median(each[name][figure] for each in whole["rounds"]))

    def share(name: str) -> float:
        ratios = [each["command"]["images_per_s"] / each[name]["images_per_s"] for each in whole["rounds"]]
        return 100 * float(median(ratios))

    served, large = whole["batches"]
    command_ms = middle("command", "cpu_ms") + whole["extra"]["cpu_ms"]
    return (
        f"`tombola classify`, a folder of {whole['pictures']:,} PNGs ({whole['data']}) to a table, from the first "
        f"picture on, medians of {len(whole['rounds'])} rounds: {middle('command', 'images_per_s'):.0f} pictures/s, "
        f"{share('served'):.0f} % of the engine alone in the service's batches of {served}, {share('engine'):.0f} % in "
        f"the command's of {large}. Processor time of a picture: {command_ms:.2f} ms by the command, of the engine "
        f"alone {middle('served', 'cpu_ms'):.2f} and {middle('engine', 'cpu_ms'):.2f} ms; {whole['note']}. "
        f"{describe_load(whole)}{describe_conditions(whole)}"
    )


def describe_load(whole: Figures) -> str:
    return f"Load of the machine before: {whole['machine']['load_before']:.1f}. "


def counts(statuses: Figures) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in sorted(statuses.items()) if count)


def describe_conditions(whole: Figures) -> str:
    machine, library, versions = whole["machine"], whole["library"], whole["versions"]
    peers = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}, "
        f"OpenVINO {machine['openvino'].split('-')[0]}, {peers}; "
        f"library {library['digest'][:12]} of {library['tickets']} tickets; "
        f"commit {whole['commit'][:12]}{'+' if whole['commit'].endswith('dirty') else ''}; {whole['when'][:10]}."
    )


def table_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
