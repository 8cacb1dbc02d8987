//! Ranks over MPI (crate `mpi`). One thread owns the engine: it carries what others ask it to, and takes in what comes
//! while they compute.

use super::watch::{Neighbour, Watch};
use ::mpi::{
    Threading,
    environment::{Universe, initialize_with_threading, processor_name},
    request::{self, Request},
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives, Destination, Equivalence, Root, Source},
};
use anyhow::{Context, Result, bail};
use std::{
    collections::{HashMap, VecDeque},
    env,
    os::unix::process::CommandExt,
    process::Command,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};
use train::{
    Result as Carried,
    ranks::{self, Ranks, gone},
};

/// What the thread of the engine is asked for.
enum Job {
    Send { to: usize, tag: usize, bytes: Vec<u8> },
    Broadcast { from: usize, bytes: Vec<u8>, done: Sender<Vec<u8>> },
    Gather { own: Vec<u8>, done: Sender<Vec<Vec<u8>>> },
    End,
}

/// What came, by rank and tag.
#[derive(Default)]
struct Arrived {
    queues: Mutex<Queues>,
    news: Condvar,
}

#[derive(Default)]
struct Queues {
    of: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
    /// Nothing will come any more.
    ended: bool,
}

impl Arrived {
    /// A poisoned lock only means that another thread failed; every change of the queues is whole.
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn put(&self, from: usize, tag: usize, bytes: Vec<u8>) {
        self.queues().of.entry((from, tag)).or_default().push_back(bytes);
        self.news.notify_all();
    }

    fn end(&self) {
        self.queues().ended = true;
        self.news.notify_all();
    }
}

struct Mpi {
    rank: usize,
    size: usize,
    jobs: Sender<Job>,
    arrived: Arc<Arrived>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

static ENGINE: OnceLock<Arc<Mpi>> = OnceLock::new();

/// Open MPI's words, of its fourth and its fifth version, for a rank that never reads in another's memory: where that
/// other dies meanwhile, the library ends the reader before it can say why.
const THROUGH_SHARED_MEMORY: [(&str, &str); 2] =
    [("OMPI_MCA_btl_vader_single_copy_mechanism", "none"), ("OMPI_MCA_smsc", "^cma")];

/// Starts this program again with these words in its environment, where the library reads them, unless they are there.
fn start_with_words() -> Result<()> {
    if THROUGH_SHARED_MEMORY.iter().all(|(name, _)| env::var_os(name).is_some()) {
        return Ok(());
    }
    let missing = THROUGH_SHARED_MEMORY.iter().filter(|(name, _)| env::var_os(name).is_none()).copied();
    let program = env::current_exe().context("this program's file cannot be found")?;
    Err(Command::new(program).args(env::args_os().skip(1)).envs(missing).exec()).context("cannot start as a rank")
}

/// Joins the other ranks of `size`; returns how many workers are this one's: ranks that may run on the same cores of the
/// same machine share them.
///
/// # Errors
/// If MPI knows of another number of ranks than the launcher, as it does where the launcher is another MPI's.
pub fn join(size: usize) -> Result<usize> {
    start_with_words()?;
    let (jobs, asked) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let arrived = Arc::<Arrived>::default();
    let own = arrived.clone();
    let thread = thread::Builder::new()
        .name("planish-mpi".into())
        .spawn(move || serve(&asked, &own, &tell))
        .context("cannot start the thread that speaks with the other ranks")?;
    let (rank, found) = told.recv().context("MPI does not start")?;
    if found != size {
        bail!(
            "the launcher started {size} ranks, and the MPI library that planish was built with sees {found}; start them \
             with the mpirun of that library"
        );
    }
    let engine = Arc::new(Mpi { rank, size, jobs, arrived, thread: Mutex::new(Some(thread)) });
    let all = neighbours(&engine)?;
    let workers = workers(&all, rank);
    Watch::new(rank, all).begin().context("cannot start the thread that watches the other ranks")?;
    ranks::set(engine.clone());
    let _ = ENGINE.set(engine);
    Ok(workers)
}

/// Leaves the other ranks: the process may end.
pub fn leave() {
    let Some(engine) = ENGINE.get() else { return };
    super::watch::end();
    let _ = engine.jobs.send(Job::End);
    let thread = engine.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
    // Whatever happened to the thread, there is nothing left to be done.
    let _ = thread.map(JoinHandle::join);
}

fn neighbours(engine: &Mpi) -> Result<Vec<Neighbour>> {
    let host = processor_name().context("this machine's name is not UTF-8")?;
    let own = serde_json::to_vec(&Neighbour::own(host))?;
    let all = ranks::meet(engine, &own)?;
    all.iter().map(|word| Ok(serde_json::from_slice(word)?)).collect()
}

fn workers(all: &[Neighbour], rank: usize) -> usize {
    let own = &all[rank];
    let sharing = all.iter().filter(|other| other.host == own.host && other.cores == own.cores).count();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    (cores / sharing.max(1)).max(1)
}

impl Mpi {
    fn ask<T>(&self, job: impl FnOnce(Sender<T>) -> Job) -> Carried<T> {
        let (done, result) = mpsc::channel();
        self.jobs.send(job(done)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&self, to: usize, tag: usize, bytes: Vec<u8>) -> Carried<()> {
        self.jobs.send(Job::Send { to, tag, bytes }).map_err(|_| gone())
    }

    fn receive(&self, from: usize, tag: usize) -> Carried<Vec<u8>> {
        let mut queues = self.arrived.queues();
        loop {
            if let Some(bytes) = queues.of.get_mut(&(from, tag)).and_then(VecDeque::pop_front) {
                return Ok(bytes);
            }
            if queues.ended {
                return Err(gone());
            }
            queues = self.arrived.news.wait(queues).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn broadcast(&self, from: usize, bytes: Vec<u8>) -> Carried<Vec<u8>> {
        self.ask(|done| Job::Broadcast { from, bytes, done })
    }

    fn gather(&self, own: Vec<u8>) -> Carried<Vec<Vec<u8>>> {
        self.ask(|done| Job::Gather { own, done })
    }

    fn saved(&self, step: u64) {
        super::watch::saved(step);
    }
}

/// The thread that speaks with MPI, and the only one.
fn serve(asked: &Receiver<Job>, arrived: &Arrived, tell: &Sender<(usize, usize)>) {
    let Some((universe, _)) = initialize_with_threading(Threading::Funneled) else { return arrived.end() };
    let world = universe.world();
    let _ = tell.send((world.rank() as usize, world.size() as usize));
    Engine { world, arrived }.serve(asked);
    arrived.end();
    finalize(universe);
}

/// MPI ends where its universe is dropped.
fn finalize(_: Universe) {}

struct Engine<'a> {
    world: SimpleCommunicator,
    arrived: &'a Arrived,
}

/// Pauses between looks at the engine: short ones while something is going on, longer ones while the cores compute.
struct Pause(u32);

impl Pause {
    const LONGEST: Duration = Duration::from_micros(500);

    fn length(&mut self) -> Duration {
        self.0 = (self.0 + 1).min(64);
        // The first looks follow each other at once.
        if self.0 < 8 { Duration::ZERO } else { Duration::from_micros(25 << (self.0 / 8)).min(Pause::LONGEST) }
    }

    fn wait(&mut self) {
        match self.length() {
            Duration::ZERO => thread::yield_now(),
            length => thread::sleep(length),
        }
    }
}

impl Engine<'_> {
    fn serve(&mut self, asked: &Receiver<Job>) {
        let mut pause = Pause(0);
        loop {
            match asked.recv_timeout(pause.length()) {
                Ok(Job::End) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(job) => {
                    self.carry(job);
                    pause = Pause(0);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.take_in() {
                pause = Pause(0);
            }
        }
    }

    fn carry(&mut self, job: Job) {
        match job {
            Job::Send { to, tag, bytes } => request::scope(|scope| {
                let to = self.world.process_at_rank(to as i32);
                self.finish(to.immediate_send_with_tag(scope, &bytes[..], tag as i32));
            }),
            Job::Broadcast { from, mut bytes, done } => {
                // The address of no bytes is 1, which Open MPI takes for a word of its own.
                if !bytes.is_empty() {
                    request::scope(|scope| {
                        let from = self.world.process_at_rank(from as i32);
                        self.finish(from.immediate_broadcast_into(scope, &mut bytes[..]));
                    });
                }
                // Who asked may have failed meanwhile.
                let _ = done.send(bytes);
            }
            Job::Gather { own, done } => _ = done.send(self.gather(&own)),
            Job::End => {}
        }
    }

    /// What each rank says: first how long it is, then pieces that are all of one length.
    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        const PIECE: usize = 1 << 22;
        let size = self.world.size() as usize;
        let mut lengths = vec![0u64; size];
        self.gather_equal(&[own.len() as u64][..], &mut lengths);
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut all = vec![Vec::new(); size];
        for from in (0..longest).step_by(PIECE) {
            let len = PIECE.min(longest - from);
            let mut piece = own[from.min(own.len())..own.len().min(from + len)].to_vec();
            piece.resize(len, 0);
            let mut pieces = vec![0u8; len * size];
            self.gather_equal(&piece[..], &mut pieces);
            for (word, piece) in all.iter_mut().zip(pieces.chunks(len)) {
                word.extend_from_slice(piece);
            }
        }
        all.iter_mut().zip(lengths).for_each(|(word, length)| word.truncate(length as usize));
        all
    }

    fn gather_equal<T: Equivalence>(&self, own: &[T], all: &mut [T]) {
        request::scope(|scope| self.finish(self.world.immediate_all_gather_into(scope, own, all)));
    }

    /// Waits for a request without keeping a core from those who compute; what other ranks send meanwhile is taken in, so
    /// that none waits for another in a circle.
    fn finish<'a, D: ?Sized, S: request::Scope<'a>>(&self, mut request: Request<'a, D, S>) {
        let mut pause = Pause(0);
        loop {
            match request.test() {
                Ok(_) => return,
                Err(unfinished) => request = unfinished,
            }
            if self.take_in() {
                pause = Pause(0);
            }
            pause.wait();
        }
    }

    /// Takes in what other ranks have sent; false where there was nothing.
    fn take_in(&self) -> bool {
        let mut some = false;
        while let Some((message, status)) = self.world.any_process().immediate_matched_probe() {
            let mut bytes = vec![0u8; status.count(u8::equivalent_datatype()).max(0) as usize];
            message.matched_receive_into(&mut bytes[..]);
            self.arrived.put(status.source_rank() as usize, status.tag() as usize, bytes);
            some = true;
        }
        some
    }
}
