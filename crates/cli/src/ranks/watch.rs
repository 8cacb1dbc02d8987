//! Watches the other ranks: where one is killed, the launcher ends them all, and what the user needs to know is said first.
//! A thread of its own does: the one that speaks with MPI may wait for ever for what a dead rank began to send.

use crate::{exit, show};
use optimize::progress;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// What the others know of a rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its machine.
    pub host: String,
    /// The cores that it may run on, as the system says.
    pub cores: String,
    process: u32,
}

impl Neighbour {
    /// This process.
    pub fn own(host: String) -> Neighbour {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:"));
        Neighbour { host, cores: cores.unwrap_or_default().trim().into(), process: std::process::id() }
    }

    /// Is it there no more, or only to be buried by its parent?
    fn ended(&self) -> bool {
        match fs::read_to_string(format!("/proc/{}/stat", self.process)) {
            Ok(text) => text.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])),
            // Without /proc nothing is known.
            Err(_) => fs::exists("/proc/self/stat").unwrap_or(false),
        }
    }
}

/// The step of the last checkpoint, and one; 0 where there is none.
static SAVED: AtomicU64 = AtomicU64::new(0);

/// Do the ranks end in order?
static ENDING: AtomicBool = AtomicBool::new(false);

/// From here on a rank that ends is no fault.
pub fn end() {
    ENDING.store(true, Ordering::Relaxed);
}

/// A checkpoint of this step is on disk.
pub fn saved(step: u64) {
    SAVED.store(step + 1, Ordering::Relaxed);
}

/// One rank's look at the others.
pub struct Watch {
    rank: usize,
    all: Vec<Neighbour>,
    /// When this process was told to end.
    told: OnceLock<Instant>,
}

/// The launcher tells all ranks to end, and kills them a second later: long enough after the first for the dead to be
/// told from those that end in order.
const FIRST: Duration = Duration::from_millis(50);
/// Those who do not speak stay for as long, so that they are not taken for the cause.
const STAY: Duration = Duration::from_millis(500);
/// Between looks.
const PAUSE: Duration = Duration::from_millis(10);

impl Watch {
    /// For a rank among all.
    pub fn new(rank: usize, all: Vec<Neighbour>) -> Watch {
        Watch { rank, all, told: OnceLock::new() }
    }

    /// Looks again and again from here on.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn begin(self) -> std::io::Result<()> {
        let look = move || {
            while !ENDING.load(Ordering::Relaxed) {
                self.look();
                thread::sleep(PAUSE);
            }
        };
        thread::Builder::new().name("planish-watch".into()).spawn(look).map(drop)
    }

    /// Ends the process where it was told to end because another rank of this machine died; the first of those that live
    /// says which one.
    fn look(&self) {
        if !progress::stopped() || self.told.get_or_init(Instant::now).elapsed() < FIRST {
            return;
        }
        let own = &self.all[self.rank];
        let here = || self.all.iter().enumerate().filter(|(_, other)| other.host == own.host);
        let Some((dead, neighbour)) = here().find(|(_, other)| other.ended()) else { return };
        if here().find(|(_, other)| !other.ended()).is_some_and(|(rank, _)| rank == self.rank) {
            let again = match SAVED.load(Ordering::Relaxed).checked_sub(1) {
                Some(step) => format!("; it goes on from step {step}"),
                None => String::new(),
            };
            let said = format!(
                "rank {dead} (process {} on {}) has ended, and with it all ranks. Start the job again, with any number of \
                 ranks{again}",
                neighbour.process, neighbour.host
            );
            show::last_word(&said);
        } else {
            thread::sleep(STAY);
        }
        std::process::exit(exit::FAULT.into());
    }
}
