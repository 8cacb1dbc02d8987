//! Ranks: processes that do one job together. Each holds the model and all of the data; they share out what takes time.
//!
//! What carries numbers between them is an engine's (MPI's in the command line); this crate says what is carried.
//! Every rank meets the others at the same places in the same order. One that failed says so at the next of them, so
//! that none waits for it.

use crate::{Error, Result};
use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

/// What goes between ranks.
pub trait Ranks: Send + Sync {
    /// Which one this process is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Sends bytes to another rank and returns at once; those of one tag arrive in the order in which they were sent.
    ///
    /// # Errors
    /// If the engine is gone.
    fn send(&self, to: usize, tag: usize, bytes: Vec<u8>) -> Result<()>;

    /// The next bytes of a rank with this tag.
    ///
    /// # Errors
    /// If the engine is gone.
    fn receive(&self, from: usize, tag: usize) -> Result<Vec<u8>>;

    /// The bytes of one rank on all; every rank gives as many.
    ///
    /// # Errors
    /// If the engine is gone.
    fn broadcast(&self, from: usize, bytes: Vec<u8>) -> Result<Vec<u8>>;

    /// What each rank says, by rank, on every rank.
    ///
    /// # Errors
    /// If the engine is gone.
    fn gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>>;

    /// A checkpoint of this step is on disk: where a job goes on that loses a rank.
    fn saved(&self, _step: u64) {}
}

/// One process: nothing is carried.
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn send(&self, _: usize, _: usize, _: Vec<u8>) -> Result<()> {
        Err(gone())
    }

    fn receive(&self, _: usize, _: usize) -> Result<Vec<u8>> {
        Err(gone())
    }

    fn broadcast(&self, _: usize, bytes: Vec<u8>) -> Result<Vec<u8>> {
        Ok(bytes)
    }

    fn gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own])
    }
}

/// There is nobody to speak with.
pub fn gone() -> Error {
    Error::Asked("the other ranks cannot be reached any more; start the job again, with any number of ranks".into())
}

static OF_PROCESS: OnceLock<Arc<dyn Ranks>> = OnceLock::new();

/// Makes this process one of several; false where it is one already.
pub fn set(ranks: Arc<dyn Ranks>) -> bool {
    OF_PROCESS.set(ranks).is_ok()
}

/// The ranks that this process belongs to: itself alone unless [`set`] said otherwise.
pub fn of_process() -> Arc<dyn Ranks> {
    OF_PROCESS.get_or_init(|| Arc::new(Alone)).clone()
}

/// What begins the word of a rank that is well.
const WELL: u8 = 1;

/// What each rank says, by rank, once all are here and well.
///
/// # Errors
/// [`Error::Elsewhere`] if one is not.
pub fn meet(ranks: &dyn Ranks, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    if ranks.size() == 1 {
        return Ok(vec![own.to_vec()]);
    }
    let said = ranks.gather([&[WELL], own].concat())?;
    let words = said.into_iter().map(|word| match word.split_first() {
        Some((&WELL, word)) => Ok(word.to_vec()),
        _ => Err(Error::Elsewhere),
    });
    words.collect()
}

/// [`meet`] of a rank that failed: the others leave what they do.
///
/// # Errors
/// If the engine is gone.
pub fn fail(ranks: &dyn Ranks) -> Result<()> {
    ranks.gather(Vec::new()).map(drop)
}

/// One rank decides for all of them.
///
/// # Errors
/// As `decide`, on rank 0; [`Error::Elsewhere`] on the others.
pub fn decided<E: From<Error>>(ranks: &dyn Ranks, decide: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
    let own = if ranks.rank() == 0 { decide()? } else { Vec::new() };
    Ok(meet(ranks, &own)?.swap_remove(0))
}

/// Numbers that ranks computed for the units that are theirs (see [`share`]), in the order of the units.
///
/// # Errors
/// [`Error::Elsewhere`] if a rank failed.
pub fn gathered(ranks: &dyn Ranks, own: &[f64]) -> Result<Vec<f64>> {
    let bytes: Vec<u8> = own.iter().flat_map(|v| v.to_le_bytes()).collect();
    let all = meet(ranks, &bytes)?;
    Ok(all.iter().flat_map(|bytes| bytes.as_chunks::<8>().0).map(|b| f64::from_le_bytes(*b)).collect())
}

/// Does any rank say so?
///
/// # Errors
/// [`Error::Elsewhere`] if a rank failed.
pub fn any(ranks: &dyn Ranks, own: bool) -> Result<bool> {
    Ok(meet(ranks, &[u8::from(own)])?.iter().any(|word| word == &[1]))
}

/// Which of `count` units are a rank's: runs of equal length, one unit more or less, the first from rank 0.
pub fn share(count: usize, ranks: &dyn Ranks) -> Range<usize> {
    let from = |rank: usize| (rank * count).div_ceil(ranks.size());
    from(ranks.rank())..from(ranks.rank() + 1)
}

/// Whose a unit is.
pub fn owner(unit: usize, count: usize, size: usize) -> usize {
    unit * size / count.max(1)
}

#[cfg(test)]
pub(crate) mod threads {
    //! Ranks that are threads, to test what is carried.

    use super::*;
    use std::{
        collections::{HashMap, VecDeque},
        sync::{Condvar, Mutex},
    };

    type Queues = HashMap<(usize, usize, usize), VecDeque<Vec<u8>>>;

    /// What the threads share.
    pub struct Room {
        size: usize,
        queues: Mutex<Queues>,
        words: Mutex<Words>,
        came: Condvar,
    }

    /// What ranks say.
    struct Words {
        /// How often all have met.
        met: u64,
        own: Vec<Option<Vec<u8>>>,
        all: Vec<Vec<u8>>,
    }

    struct Thread {
        rank: usize,
        room: Arc<Room>,
    }

    impl Ranks for Thread {
        fn rank(&self) -> usize {
            self.rank
        }

        fn size(&self) -> usize {
            self.room.size
        }

        fn send(&self, to: usize, tag: usize, bytes: Vec<u8>) -> Result<()> {
            self.room.queues.lock().unwrap().entry((self.rank, to, tag)).or_default().push_back(bytes);
            self.room.came.notify_all();
            Ok(())
        }

        fn receive(&self, from: usize, tag: usize) -> Result<Vec<u8>> {
            let mut queues = self.room.queues.lock().unwrap();
            loop {
                if let Some(bytes) = queues.get_mut(&(from, self.rank, tag)).and_then(VecDeque::pop_front) {
                    return Ok(bytes);
                }
                queues = self.room.came.wait(queues).unwrap();
            }
        }

        fn broadcast(&self, from: usize, bytes: Vec<u8>) -> Result<Vec<u8>> {
            let len = bytes.len();
            let mut words = self.gather(bytes)?;
            assert!(words.iter().all(|w| w.len() == len));
            Ok(words.swap_remove(from))
        }

        fn gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
            let mut words = self.room.words.lock().unwrap();
            let turn = words.met;
            words.own[self.rank] = Some(own);
            if words.own.iter().all(Option::is_some) {
                words.all = words.own.iter_mut().map(|w| w.take().unwrap()).collect();
                words.met += 1;
                self.room.came.notify_all();
            }
            while words.met == turn {
                words = self.room.came.wait(words).unwrap();
            }
            Ok(words.all.clone())
        }
    }

    /// Runs a job on so many ranks; returns what each made of it.
    pub fn run<T: Send>(size: usize, job: impl Fn(Arc<dyn Ranks>) -> T + Sync) -> Vec<T> {
        let room = Arc::new(Room {
            size,
            queues: Mutex::default(),
            words: Mutex::new(Words { met: 0, own: vec![None; size], all: Vec::new() }),
            came: Condvar::new(),
        });
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..size)
                .map(|rank| {
                    let (room, job) = (room.clone(), &job);
                    scope.spawn(move || job(Arc::new(Thread { rank, room })))
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_unit_has_one_owner_and_shares_are_even() {
        for size in 1..7 {
            for count in 0..20 {
                let shares = run(size, |ranks| share(count, &*ranks));
                let units: Vec<usize> = shares.iter().cloned().flatten().collect();
                assert!(units.iter().copied().eq(0..count));
                assert!(shares.iter().all(|s| s.len() <= count.div_ceil(size)));
                for (rank, share) in shares.into_iter().enumerate() {
                    assert!(share.clone().all(|unit| owner(unit, count, size) == rank), "{share:?} of {count}, {size}");
                }
            }
        }
    }

    #[test]
    fn a_rank_that_fails_ends_the_others() {
        let said =
            run(3, |ranks| if ranks.rank() == 1 { fail(&*ranks).map(|()| Vec::new()) } else { meet(&*ranks, b"well") });
        assert!(matches!(said[..], [Err(Error::Elsewhere), Ok(_), Err(Error::Elsewhere)]), "{said:?}");
        let said = run(3, |ranks| gathered(&*ranks, &vec![0.5; ranks.rank()]).unwrap());
        assert_eq!(said, vec![vec![0.5; 3]; 3]);
    }
}
