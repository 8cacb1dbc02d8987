//! Files that appear whole or not at all: written beside, flushed, renamed, the directory flushed.
//!
//! The file beside has a fixed name, `.NAME.partial`, and is locked while it is written. So what a killed program
//! left is taken over by the next one that writes the same file, and two writers cannot mix.

use crate::{Error, Result};
use rustix::{fs::FallocateFlags, io::Errno};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{BufWriter, ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// How often a file beside that another writer has just renamed away is looked up again.
const RETRIES: usize = 16;

/// Writes a file whose size is known beforehand.
///
/// `write` gets a buffered writer; an error of its own is passed on. A failure leaves the old file and no debris.
/// An existing file hands on its permissions; a link is replaced, not followed.
///
/// # Errors
/// [`Error::DiskFull`] before the first byte where the volume has less room than `size`, or later where it fills up;
/// [`Error::Field`] if another program is writing the same file.
pub fn write_file(path: &Path, size: u64, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let directory = parent(path);
    let beside = directory.join(format!(".{}.partial", file_name(path)?));
    let file = lock_beside(path, &beside)?;
    let result = write_beside(path, &beside, file, size, write);
    if result.is_err() {
        // The first fault is the one to tell; that the rest cannot be removed either changes nothing.
        let _ = fs::remove_file(&beside);
    }
    match result {
        // What the unfinished file held is free again: only now can the missing bytes be told.
        Err(Error::DiskFull { path, needed, .. }) => {
            let free = free_bytes(&directory).unwrap_or(0);
            Err(Error::DiskFull { path, needed, free })
        }
        Err(e) => Err(e),
        Ok(()) => sync_directory(&directory),
    }
}

/// Opens the file beside and makes it this writer's own.
fn lock_beside(path: &Path, beside: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    for _ in 0..RETRIES {
        let file = options.open(beside).map_err(Error::io(beside, "create it"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::field(path, "the file", "is being written by another program; wait for it"));
            }
            // Some network volumes have no locks; there the name alone has to do.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(Error::io(beside, "lock it")(e)),
        }
        // Its former owner may have renamed it to its final name between our opening and locking it.
        let ours = file.metadata().map_err(Error::io(beside, "look at it"))?;
        if fs::symlink_metadata(beside).is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
    Err(Error::field(path, "the file", "is being written over and over by other programs; wait for them"))
}

fn write_beside(
    path: &Path,
    beside: &Path,
    file: File,
    size: u64,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    file.set_len(0).map_err(Error::io(beside, "empty it"))?;
    if let Ok(old) = fs::metadata(path)
        && old.is_file()
    {
        file.set_permissions(old.permissions()).map_err(Error::io(beside, "give it the old file's permissions"))?;
    }
    reserve(path, &file, size)?;
    let mut out = Counted { inner: BufWriter::with_capacity(1 << 20, file), bytes: 0 };
    write(&mut out)?;
    // A writer that said too little is told what it has asked for.
    let needed = size.max(out.bytes);
    let full = |e: std::io::Error| full_or(path, needed, e);
    let file = out.inner.into_inner();
    let file = file.map_err(|e| full(e.into_error()))?;
    file.sync_all().map_err(full)?;
    fs::rename(beside, path).map_err(Error::io(path, "rename the finished file"))
}

/// A writer that knows how many bytes it was given.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Takes the room on the volume now, so that a long job does not find it gone at the end.
fn reserve(path: &Path, file: &File, size: u64) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    // A volume may promise more than it has; what is free is asked first.
    check_room(path, size)?;
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, size) {
        Err(e @ (Errno::NOSPC | Errno::DQUOT)) => Err(full_or(path, size, e.into())),
        // Not every volume can reserve; then the writing itself finds out.
        _ => Ok(()),
    }
}

/// Writes bytes.
///
/// # Errors
/// As [`write_file`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, bytes.len() as u64, |out| out.write_all(bytes).map_err(|e| full_or(path, bytes.len() as u64, e)))
}

/// Tells a full disk from other faults of writing.
pub fn full_or(path: &Path, needed: u64, e: std::io::Error) -> Error {
    if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
        return Error::DiskFull { path: path.into(), needed, free: free_bytes(&parent(path)).unwrap_or(0) };
    }
    Error::Io { path: path.into(), doing: "write it", source: e }
}

/// Refuses where the volume has less room than a file takes.
///
/// # Errors
/// [`Error::DiskFull`].
pub fn check_room(path: &Path, needed: u64) -> Result<()> {
    match free_bytes(&parent(path)) {
        Some(free) if free < needed => Err(Error::DiskFull { path: path.into(), needed, free }),
        _ => Ok(()),
    }
}

/// Bytes free to this user on the volume of a directory.
pub fn free_bytes(directory: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Flushes a directory, so that a rename in it outlives a power cut.
///
/// # Errors
/// If the directory cannot be opened or flushed.
pub fn sync_directory(directory: &Path) -> Result<()> {
    let file = File::open(directory).map_err(Error::io(directory, "open it"))?;
    file.sync_all().map_err(Error::io(directory, "flush it"))
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.into(),
        _ => PathBuf::from("."),
    }
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
    name.ok_or_else(|| Error::field(path, "the path", "names no file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_debris() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_bytes(&path, b"old").unwrap();
        let e = write_file(&path, 3, |out| {
            out.write_all(b"new").unwrap();
            Err(Error::field(Path::new("x"), "y", "is wrong"))
        });
        assert!(e.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_program_left_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(dir.path().join(".a.partial"), b"half of something longer").unwrap();
        write_bytes(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn two_writers_of_one_file_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let inner = std::cell::Cell::new(String::new());
        write_file(&path, 5, |out| {
            inner.set(write_bytes(&path, b"other").unwrap_err().to_string());
            out.write_all(b"first").map_err(|e| full_or(&path, 5, e))
        })
        .unwrap();
        assert!(inner.into_inner().contains("being written by another program"));
        assert_eq!(fs::read(&path).unwrap(), b"first");
        std::thread::scope(|s| {
            for text in [b"1111", b"2222", b"3333", b"4444"] {
                let path = &path;
                s.spawn(move || (0..50).filter(|_| write_bytes(path, text).is_ok()).count());
            }
        });
        let last = fs::read(&path).unwrap();
        assert!(last.len() == 4 && last.iter().all(|b| *b == last[0]), "{last:?}");
    }

    #[test]
    fn a_full_disk_is_told_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_bytes(&path, b"old").unwrap();
        let e = write_file(&path, 1 << 60, |_| Ok(())).unwrap_err();
        assert!(e.to_string().contains("the disk is full") && e.to_string().contains("more would do"), "{e}");
        assert!(e.is_system());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_mode_is_that_of_any_new_file_or_of_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("a"), dir.path().join("b"));
        write_bytes(&ours, b"x").unwrap();
        fs::write(&plain, b"x").unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&ours), mode(&plain));
        fs::set_permissions(&ours, fs::Permissions::from_mode(0o640)).unwrap();
        write_bytes(&ours, b"y").unwrap();
        assert_eq!(mode(&ours), 0o640);
    }

    #[test]
    fn a_path_that_names_no_file_or_directory_is_an_error() {
        assert!(write_bytes(Path::new("/"), b"x").is_err());
        assert!(write_bytes(Path::new("/nowhere/at/all"), b"x").unwrap_err().to_string().contains("nowhere"));
    }
}
