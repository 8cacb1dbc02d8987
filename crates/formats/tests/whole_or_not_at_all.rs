//! Writing under a full disk and under sudden death: the file is the old one or the new one, and nothing stays behind.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

use formats::{Error, atomic};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Names the file that the child process of the kill test writes over and over.
const CHILD: &str = "PLANISH_TEST_WRITES";
const SIZE: usize = 8 << 20;

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The part of the kill test that gets killed; does nothing when run as a test of its own.
#[test]
fn child_writes_until_it_is_killed() {
    let Some(path) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    for round in 0u8.. {
        atomic::write_bytes(&path, &vec![round; SIZE]).unwrap();
    }
}

#[test]
fn a_writer_killed_at_any_moment_leaves_a_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights");
    atomic::write_bytes(&path, &vec![255; SIZE]).unwrap();
    for kill in 0..40u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_writes_until_it_is_killed"])
            .env(CHILD, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(4 + kill * 7 % 41));
        child.kill().unwrap();
        child.wait().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() == SIZE && bytes.iter().all(|b| *b == bytes[0]), "kill {kill} leaves a broken file");
    }
    // What the last one left beside the file is taken over by the next writer of it.
    atomic::write_bytes(&path, b"done").unwrap();
    assert_eq!(entries(dir.path()), ["weights"]);
}

/// A volume of one MiB, taken away again at the end.
struct SmallVolume(tempfile::TempDir);

impl SmallVolume {
    fn mount() -> Option<SmallVolume> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|s| s.success()).then(|| SmallVolume(dir))
    }
}

impl Drop for SmallVolume {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0.path()).status().unwrap();
    }
}

#[test]
fn a_full_disk_keeps_the_old_file_and_says_how_much_is_missing() {
    let Some(volume) = SmallVolume::mount() else {
        told("skipped: mounting a small volume needs root");
        return;
    };
    let path = volume.0.path().join("weights");
    atomic::write_bytes(&path, &[1; 600 << 10]).unwrap();

    let Err(Error::DiskFull { needed, free, .. }) = atomic::write_bytes(&path, &[2; 600 << 10]) else {
        panic!("600 KiB beside 600 KiB fit into 1 MiB")
    };
    assert_eq!((needed, free), (600 << 10, 424 << 10));

    // A writer that says too little finds out while it writes.
    let result = atomic::write_file(&path, 1, |out| {
        (0..10).try_for_each(|_| out.write_all(&[3; 100 << 10]).map_err(|e| atomic::full_or(&path, 1000 << 10, e)))
    });
    let Err(Error::DiskFull { needed, free, .. }) = result else { panic!("1000 KiB beside 600 KiB fit into 1 MiB") };
    assert_eq!((needed, free), (1000 << 10, 424 << 10));

    assert_eq!(fs::read(&path).unwrap(), [1; 600 << 10]);
    assert_eq!(entries(volume.0.path()), ["weights"]);
}

/// Says so past the test harness, which keeps what a passing test prints to itself.
fn told(words: &str) {
    use std::io::Write;
    // A closed standard error is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{words}");
}
