//! The worker pool. Work is cut in a fixed way, so no result depends on how many workers there are.
//!
//! A parallel section hands tasks to workers that spin for a moment after the last one, so that the hundred
//! sections of a token cost about a microsecond each; workers that wait longer sleep.

use std::{
    cell::{Cell, UnsafeCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, OnceLock, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

/// Sets the number of worker threads of the whole process; without a call, one per core.
///
/// Returns false where the pool already runs with another number, which a process cannot change.
pub fn set(threads: usize) -> bool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().is_ok()
        || rayon::current_num_threads() == threads
}

/// Tasks of a section for each worker from which on it matters little that the last of them end apart.
pub(crate) const TASKS: usize = 3;

/// Worker threads that a section may use here.
pub fn count() -> usize {
    rayon::current_num_threads().min(LIMIT.get())
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

thread_local! {
    static LIMIT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Runs `f` with at most `threads` workers in the sections that it begins.
pub fn limited<T>(threads: usize, f: impl FnOnce() -> T) -> T {
    struct Restore(usize);
    impl Drop for Restore {
        fn drop(&mut self) {
            LIMIT.set(self.0);
        }
    }
    let _restore = Restore(LIMIT.replace(threads.max(1)));
    f()
}

/// Runs `task` for 0 to `tasks - 1`, each once, on all workers; returns when all are done.
///
/// A worker has a share of neighbouring tasks and helps with others when it is done. Sections one after the other whose tasks
/// are runs of the same rows so find these in the caches of their core.
///
/// Inside another section, or while another thread runs one, all tasks run here.
pub fn each(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    run_shared(tasks, count().min(tasks), task);
}

/// The same, where workers take the tasks in turn: those that begin first are done first.
pub(crate) fn each_in_turn(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    run_shared(tasks, 1, task);
}

fn run_shared(tasks: usize, shares: usize, task: &(dyn Fn(usize) + Sync)) {
    let team = (tasks > 1 && count() > 1).then(team);
    // A panic of a task leaves nothing half done in the team, so a poisoned lock is as good as new.
    let turn = team.and_then(|team| match team.turn.try_lock() {
        Ok(turn) => Some(turn),
        Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    });
    match (team, turn) {
        (Some(team), Some(_turn)) => team.each(tasks, shares, task),
        _ => (0..tasks).for_each(task),
    }
}

/// The job of a section.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    shares: usize,
}

/// The task of a share that comes next, on a line of its own: workers would wait for each other's.
#[repr(align(128))]
#[derive(Default)]
struct Next(AtomicUsize);

/// The workers and what they share.
struct Team {
    /// Held by the thread that runs a section.
    turn: Mutex<()>,
    /// Counts sections.
    epoch: AtomicU64,
    /// Twice the number of workers inside the section, plus one while it is open.
    inside: AtomicUsize,
    /// One for each share there may be.
    next: Vec<Next>,
    /// Set when a task panicked.
    failed: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    workers: OnceLock<Vec<Worker>>,
}

struct Worker {
    thread: Thread,
    asleep: AtomicBool,
}

// SAFETY: `job` is written only by the holder of `turn` while no worker is inside, and read only by workers inside.
unsafe impl Sync for Team {}
// SAFETY: as above; the pointer in `job` is only followed while its section runs.
unsafe impl Send for Team {}

/// How long a worker looks for the next section before it sleeps.
const PATIENCE: Duration = Duration::from_micros(200);

fn team() -> &'static Team {
    static TEAM: OnceLock<&'static Team> = OnceLock::new();
    TEAM.get_or_init(|| {
        let team: &'static Team = Box::leak(Box::new(Team {
            turn: Mutex::new(()),
            epoch: AtomicU64::new(0),
            inside: AtomicUsize::new(0),
            next: (0..rayon::current_num_threads()).map(|_| Next::default()).collect(),
            failed: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            workers: OnceLock::new(),
        }));
        let workers = (1..rayon::current_num_threads()).filter_map(|i| {
            let name = format!("planish-{i}");
            let handle = thread::Builder::new().name(name).spawn(move || team.serve(i - 1)).ok()?;
            Some(Worker { thread: handle.thread().clone(), asleep: AtomicBool::new(false) })
        });
        let workers = workers.collect();
        team.workers.get_or_init(|| workers);
        team
    })
}

impl Team {
    fn each(&self, tasks: usize, shares: usize, task: &(dyn Fn(usize) + Sync)) {
        let Some(workers) = self.workers.get() else { return (0..tasks).for_each(task) };
        // A pool that the section was begun in may have more workers than the team.
        let shares = shares.min(self.next.len());
        // SAFETY: the lifetime is only forgotten: the section ends, with no worker inside, before this returns.
        let forgotten: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(std::ptr::from_ref(task)) };
        // SAFETY: the turn is ours and the last section was left by every worker.
        unsafe { *self.job.get() = Some(Job { task: forgotten, tasks, shares }) };
        for (share, next) in self.next.iter().take(shares).enumerate() {
            next.0.store(first_of(share, shares, tasks), Ordering::Relaxed);
        }
        self.failed.store(false, Ordering::Relaxed);
        self.inside.store(1, Ordering::Release);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in workers.iter().take((count() - 1).min(tasks - 1)) {
            if worker.asleep.swap(false, Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| self.work(0, tasks, shares, task)));
        self.inside.fetch_and(!1, Ordering::AcqRel);
        let mut turns = 0u32;
        while self.inside.load(Ordering::Acquire) != 0 {
            turns += 1;
            // A worker that lost its core needs it back.
            if turns.is_multiple_of(1 << 14) { thread::yield_now() } else { std::hint::spin_loop() }
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!self.failed.load(Ordering::Acquire), "a task of a parallel section panicked");
    }

    /// Runs what is left of the own share, then of the others.
    fn work(&self, own: usize, tasks: usize, shares: usize, task: &(dyn Fn(usize) + Sync)) {
        for share in (0..shares).map(|i| (own + i) % shares) {
            let (next, end) = (&self.next[share].0, first_of(share + 1, shares, tasks));
            while next.load(Ordering::Relaxed) < end {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i < end {
                    task(i);
                }
            }
        }
    }

    /// The life of a worker.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(index, seen);
            // Late for the section? Then its job is gone and its door closed.
            let entered = self
                .inside
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| (state & 1 == 1).then_some(state + 2));
            if entered.is_err() {
                continue;
            }
            // SAFETY: the section is open and this worker inside, so the job stays until it leaves.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above: the caller of `each` waits for this worker.
                let task = unsafe { &*job.task };
                if catch_unwind(AssertUnwindSafe(|| self.work(index + 1, job.tasks, job.shares, task))).is_err() {
                    self.failed.store(true, Ordering::Release);
                }
            }
            self.inside.fetch_sub(2, Ordering::AcqRel);
        }
    }

    /// Waits for a section after `seen`; returns its number.
    fn wait(&self, index: usize, seen: u64) -> u64 {
        let begin = Instant::now();
        loop {
            for _ in 0..256 {
                let epoch = self.epoch.load(Ordering::Acquire);
                if epoch != seen {
                    return epoch;
                }
                std::hint::spin_loop();
            }
            let Some(worker) = self.workers.get().and_then(|w| w.get(index)) else {
                thread::yield_now();
                continue;
            };
            if begin.elapsed() > PATIENCE {
                worker.asleep.store(true, Ordering::SeqCst);
                // A section that began before the flag was seen must not be slept through.
                if self.epoch.load(Ordering::SeqCst) == seen {
                    thread::park();
                }
                worker.asleep.store(false, Ordering::SeqCst);
            }
        }
    }
}

/// The first task of a share.
fn first_of(share: usize, shares: usize, tasks: usize) -> usize {
    (share as u128 * tasks as u128 / shares as u128) as usize
}

/// A pointer that workers share while each writes places of its own.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: the pointer is only dereferenced through `slice`, whose contract keeps the places of two workers apart.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares the values of a slice that outlives the parallel section.
    pub(crate) fn new(values: &mut [T]) -> Shared<T> {
        Shared(values.as_mut_ptr())
    }

    /// The values `start..start + len`.
    ///
    /// # Safety
    /// The range lies inside the shared slice, the slice is still borrowed by the caller of the parallel
    /// section, and no other worker touches the range meanwhile.
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller keeps the range inside the slice and to itself.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    /// Where value `at` lies, for a kernel.
    ///
    /// # Safety
    /// As of [`Shared::slice`], for what is read and written there.
    pub(crate) unsafe fn at(self, at: usize) -> *mut T {
        // SAFETY: the caller keeps the place inside the slice.
        unsafe { self.0.add(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_however_sections_nest_and_meet() {
        let total = AtomicUsize::new(0);
        let add = |i| _ = total.fetch_add(i, Ordering::Relaxed);
        thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for tasks in 0..200 {
                        each(tasks, &|_| each(3, &add));
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 3 * 3 * (0..200).sum::<usize>());
    }

    #[test]
    fn a_panic_of_a_task_reaches_the_caller_and_the_team_lives_on() {
        let run = || each(8, &|i| assert!(i != 5, "five"));
        assert!(catch_unwind(run).is_err());
        let total = AtomicUsize::new(0);
        let add = |i| _ = total.fetch_add(i, Ordering::Relaxed);
        limited(1, || each(8, &add));
        each(8, &add);
        assert_eq!(total.into_inner(), 56);
    }
}
