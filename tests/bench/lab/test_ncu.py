"""Reports of Nsight Compute's command line."""

from __future__ import annotations

import pytest

from bench.lab.ncu import moved_by_calls

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
SEPARATOR = "<unnamed>::spin_kernel(long)"


def launch(at: int, kernel: str, read: str, written: str, unit: str = "byte") -> list[str]:
    start = (
        f'"{at}","2583","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(4096, 1, 1)",'
        '"0","9.0","Command line profiler metrics"'
    )
    return [
        f'{start},"dram__bytes_read.sum","{unit}","{read}"',
        f'{start},"dram__bytes_write.sum","{unit}","{written}"',
    ]


def report(*launches: list[str]) -> str:
    """As `ncu --csv --log-file` writes it, with its own messages before and after."""
    lines = [
        "==PROF== Connected to process 2583 (/usr/bin/python3.12)",
        '==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass',
        "==PROF== Disconnected from process 2583",
        HEAD,
        *(line for lines in launches for line in lines),
        "==WARNING== Note: metrics may not be reliable.",
    ]
    return "\n".join(lines)


def test_launches_belong_to_the_call_before_them() -> None:
    text = report(
        launch(0, SEPARATOR, "1,024", "512"),
        launch(1, "forward_kernel", "2,101,346,304", "65,536"),
        launch(2, "void at::native::reduce_kernel<512, 1, sum>(T3)", "16,384", "0"),
        launch(3, SEPARATOR, "0", "0"),
        launch(4, SEPARATOR, "0", "0"),
        launch(5, "backward_kernel", "7", "1,050,673,152"),
    )
    assert moved_by_calls(text, "spin_kernel") == [
        (2_101_346_304 + 16_384, 65_536),
        (0, 0),
        (7, 1_050_673_152),
    ]


def test_a_report_without_launches_has_no_calls() -> None:
    assert moved_by_calls("==WARNING== No kernels were profiled.\n", "spin_kernel") == []


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="expected bytes, got 'Mbyte' of dram__bytes_read"):
        moved_by_calls(report(launch(0, SEPARATOR, "2.5", "1", unit="Mbyte")), "spin_kernel")
    with pytest.raises(ValueError, match="forward_kernel was launched before the first"):
        moved_by_calls(report(launch(0, "forward_kernel", "2", "1")), "spin_kernel")
