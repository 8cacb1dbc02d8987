//! Memory of this process and of the system.

/// Most memory that this process held, in bytes.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |k| k * 1024)
}

/// Memory that the system could give this process without swapping, in bytes.
pub fn free_memory_bytes() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |k| k * 1024)
}

/// Starts counting [`peak_rss_bytes`] anew, where the system can.
pub fn forget_peak() {
    // The system may not let us; the peak then includes what came before.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
