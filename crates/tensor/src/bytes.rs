//! Shared, immutable bytes: owned, or part of a memory-mapped file.

use memmap2::{Advice, Mmap, MmapMut, UncheckedAdvice};
use std::{
    fs::File,
    io,
    ops::{Deref, DerefMut, Range},
    path::Path,
    sync::Arc,
};

/// A range of bytes that is cheap to clone and to cut.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Owner>,
    range: Range<usize>,
}

enum Owner {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
    Map(Mmap),
    Pages(MmapMut),
}

impl Owner {
    fn as_slice(&self) -> &[u8] {
        match self {
            Owner::Bytes(v) => v,
            Owner::Floats(v) => bytemuck::cast_slice(v),
            Owner::Map(m) => m,
            Owner::Pages(m) => m,
        }
    }
}

impl Bytes {
    /// Maps a file. Another program that shortens the file meanwhile ends this one, as with any map.
    ///
    /// # Errors
    /// If the file cannot be opened or mapped, or changed its length while it was.
    pub fn map(path: &Path) -> io::Result<Bytes> {
        // Asked before opening: to open a named pipe would wait for a writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"));
        }
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if meta.len() == 0 {
            return Ok(Bytes::from_vec(Vec::new()));
        }
        // SAFETY: the map is private to this process and read only; that no other program changes the file
        // meanwhile is asked of the user, and the tensors read from it have no invalid bit patterns.
        let map = unsafe { Mmap::map(&file)? };
        if map.len() as u64 != meta.len() {
            return Err(io::Error::other("changed its length while it was opened"));
        }
        let range = 0..map.len();
        Ok(Bytes { owner: Arc::new(Owner::Map(map)), range })
    }

    /// Owned bytes.
    pub fn from_vec(bytes: Vec<u8>) -> Bytes {
        let range = 0..bytes.len();
        Bytes { owner: Arc::new(Owner::Bytes(bytes)), range }
    }

    /// Owned floats, as their bytes in memory.
    pub fn from_f32(floats: Vec<f32>) -> Bytes {
        let range = 0..4 * floats.len();
        Bytes { owner: Arc::new(Owner::Floats(floats)), range }
    }

    /// A part, without a copy; `None` where the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        Some(Bytes { owner: self.owner.clone(), range })
    }

    /// The bytes as floats, where they are aligned and whole.
    pub fn as_f32(&self) -> Option<&[f32]> {
        bytemuck::try_cast_slice(self).ok()
    }

    /// All of them, to be written: only memory of our own that nothing else shares.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        let range = self.range.clone();
        match Arc::get_mut(&mut self.owner)? {
            Owner::Bytes(v) => Some(&mut v[range]),
            Owner::Floats(v) => Some(&mut bytemuck::cast_slice_mut::<f32, u8>(v)[range]),
            Owner::Pages(map) => Some(&mut map[range]),
            Owner::Map(_) => None,
        }
    }

    /// Says that a range is read next: the pages of a mapped file are brought in at once, not one fault at a time.
    pub fn will_need(&self, range: Range<usize>) {
        if let Owner::Map(map) = &*self.owner {
            // Only speed depends on it, and older kernels do not know it.
            let _ = map.advise_range(Advice::PopulateRead, self.range.start + range.start, range.len());
        }
    }

    /// Says that a range is not read again soon: the memory of a mapped file's pages is given back, and of those around it,
    /// which come back when they are read.
    pub fn release(&self, range: Range<usize>) {
        // A fault maps up to a large folio of the page cache: what lies beside the range came with it, and nobody else would let it go.
        const AROUND: usize = 2 << 20;
        if let Owner::Map(map) = &*self.owner {
            let start = (self.range.start + range.start).saturating_sub(AROUND);
            let end = (self.range.start + range.end).saturating_add(AROUND).min(map.len());
            // SAFETY: the pages of a read-only map of a file come back with the same bytes when they are read again.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }

    /// Do they lie in a mapped file rather than in memory of our own?
    pub fn is_mapped(&self) -> bool {
        matches!(*self.owner, Owner::Map(_))
    }
}

/// Memory in huge pages where the system has them (2 MiB instead of 4 KiB: reads of many gigabytes a second
/// otherwise wait for address translation), to be filled and then frozen.
pub struct Pages {
    map: Option<MmapMut>,
}

impl Pages {
    /// Zeroed memory of `len` bytes.
    ///
    /// # Errors
    /// If the system has not got it.
    pub fn new(len: usize) -> io::Result<Pages> {
        if len == 0 {
            return Ok(Pages { map: None });
        }
        // A whole number of huge pages, so that the last one counts too, unless it would be the only one.
        const HUGE: usize = 2 << 20;
        let map = MmapMut::map_anon(if len < HUGE / 2 { len } else { len.next_multiple_of(HUGE) })?;
        // Where it cannot be had, ordinary pages do.
        #[cfg(target_os = "linux")]
        let _ = map.advise(Advice::HugePage);
        Ok(Pages { map: Some(map) })
    }

    /// The memory.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }

    /// Makes it shared and immutable.
    pub fn freeze(self) -> Bytes {
        let Some(map) = self.map else { return Bytes::from_vec(Vec::new()) };
        let range = 0..map.len();
        Bytes { owner: Arc::new(Owner::Pages(map)), range }
    }
}

/// A range of [`Pages`] of its own, zeroed at first; a clone is a copy.
pub struct Region {
    /// Keeps the memory that `start` points into; an empty region has none.
    pages: Option<Arc<Pages>>,
    start: *mut u8,
    len: usize,
}

// SAFETY: a region alone reads and writes its range, which `Region::cut` keeps apart from all others.
unsafe impl Send for Region {}
// SAFETY: as above; what is shared is only read.
unsafe impl Sync for Region {}

impl Region {
    /// Regions of these lengths, one after the other in the same pages, each from a cache line on.
    ///
    /// Memory that is missing ends the program, as with a `Vec`.
    pub fn cut(lens: &[usize]) -> Vec<Region> {
        let whole = lens.iter().map(|len| len.next_multiple_of(64)).sum();
        let Ok(mut pages) = Pages::new(whole) else {
            let layout = std::alloc::Layout::from_size_align(whole, 64);
            std::alloc::handle_alloc_error(layout.unwrap_or(std::alloc::Layout::new::<u8>()))
        };
        let mut rest = pages.as_mut_slice();
        let mut starts = Vec::with_capacity(lens.len());
        for len in lens {
            let (own, others) = rest.split_at_mut(len.next_multiple_of(64));
            starts.push(own.as_mut_ptr());
            rest = others;
        }
        let pages = Arc::new(pages);
        starts
            .into_iter()
            .zip(lens)
            .map(|(start, len)| Region { pages: Some(pages.clone()), start, len: *len })
            .collect()
    }
}

impl Default for Region {
    fn default() -> Region {
        Region { pages: None, start: std::ptr::NonNull::dangling().as_ptr(), len: 0 }
    }
}

impl Clone for Region {
    fn clone(&self) -> Region {
        let mut own = Region::cut(&[self.len]).pop().unwrap_or_default();
        own.copy_from_slice(self);
        own
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside the pages that `self` keeps, and nobody else writes it.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region({} of {})", self.len, self.pages.as_ref().and_then(|p| p.map.as_ref()).map_or(0, |m| m.len()))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_slice()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_and_stay_inside() {
        let b = Bytes::from_vec((0..10).collect());
        assert_eq!(&*b.slice(2..5).unwrap().slice(1..3).unwrap(), [3, 4]);
        assert!(b.slice(5..11).is_none());
        assert_eq!(Bytes::from_f32(vec![1.0, 2.0]).as_f32(), Some(&[1.0, 2.0][..]));
    }

    #[test]
    fn regions_are_apart_and_clones_are_copies() {
        for scale in [1, 1 << 20] {
            let lens = [3 * scale, 0, 65 * scale / 8, 1];
            let mut regions = Region::cut(&lens);
            assert!(regions.iter().zip(lens).all(|(r, len)| r.len() == len && r.iter().all(|b| *b == 0)));
            for (i, r) in regions.iter_mut().enumerate() {
                r.fill(i as u8 + 1);
            }
            let mut copy = regions[2].clone();
            copy.fill(9);
            assert!(regions.iter().enumerate().all(|(i, r)| r.iter().all(|b| *b == i as u8 + 1)));
        }
        assert!(Region::default().is_empty());
    }

    #[test]
    fn a_mapped_file_reads_like_its_bytes() {
        let path = std::env::temp_dir().join(format!("planish-bytes-{}", std::process::id()));
        std::fs::write(&path, b"hello").unwrap();
        let b = Bytes::map(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(b.is_mapped() && &*b == b"hello");
        assert!(Bytes::map(&std::env::temp_dir()).is_err());
    }

    #[test]
    fn an_empty_file_is_an_empty_range() {
        let path = std::env::temp_dir().join(format!("planish-empty-{}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        let b = Bytes::map(&path);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(b.unwrap().len(), 0);
    }
}
