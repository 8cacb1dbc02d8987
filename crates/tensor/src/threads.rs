//! The worker pool. Work is cut in a fixed way, so no result depends on how many workers there are.

/// Sets the number of worker threads of the whole process; without a call, one per core.
///
/// Returns false where the pool already runs with another number, which a process cannot change.
pub fn set(threads: usize) -> bool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().is_ok() || count() == threads
}

/// Worker threads.
pub fn count() -> usize {
    rayon::current_num_threads()
}

/// Runs `f` on a worker: parallel sections that begin there cost no hand-over from a thread outside the pool.
pub fn run<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    let mut result = None;
    rayon::scope(|_| result = Some(f()));
    match result {
        Some(result) => result,
        // `scope` returns only after the closure did, and passes its panic on.
        None => unreachable!("a scope runs its closure"),
    }
}

/// A pointer that workers share while each writes places of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: the pointer is only dereferenced through `slice`, whose contract keeps the places of two workers apart.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Shares the values of a slice that outlives the parallel section.
    pub(crate) fn new(values: &mut [f32]) -> Shared {
        Shared(values.as_mut_ptr())
    }

    /// The values `start..start + len`.
    ///
    /// # Safety
    /// The range lies inside the shared slice, the slice is still borrowed by the caller of the parallel
    /// section, and no other worker touches the range meanwhile.
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller keeps the range inside the slice and to itself.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
