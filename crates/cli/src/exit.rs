//! Exit codes: 0 done, 1 the gate said no, 2 wrong usage or bad input, 3 out of memory, disk or time,
//! 4 input/output or internal fault, 130 interrupted and resumable.

use formats::Error as File;
use optimize::Error as Job;

/// The gate said no, or no recipe meets the target.
pub const GATE: u8 = 1;
/// Wrong usage or bad input.
pub const USAGE: u8 = 2;
/// Out of memory, disk or time.
pub const RESOURCE: u8 = 3;
/// Input/output or internal fault.
pub const FAULT: u8 = 4;
/// Interrupted; the same command goes on.
pub const INTERRUPTED: u8 = 130;

/// The exit code of an error.
pub fn code(e: &anyhow::Error) -> u8 {
    for cause in e.chain() {
        if let Some(lesson) = cause.downcast_ref::<train::Error>() {
            return of_lesson(lesson);
        }
        if let Some(job) = cause.downcast_ref::<Job>() {
            match job {
                Job::Gate(_) => return GATE,
                Job::Train(lesson) => return of_lesson(lesson),
                Job::Memory { .. } | Job::Model(model::Error::NoRoom { .. }) => return RESOURCE,
                Job::File(f) | Job::Model(model::Error::Format(f)) => return of_file(f),
                _ => return USAGE,
            }
        }
        if let Some(f) = cause.downcast_ref::<File>() {
            return of_file(f);
        }
        if let Some(m) = cause.downcast_ref::<model::Error>() {
            return match m {
                model::Error::Format(f) => of_file(f),
                model::Error::NoRoom { .. } => RESOURCE,
                _ => USAGE,
            };
        }
        if cause.downcast_ref::<std::io::Error>().is_some() {
            return FAULT;
        }
    }
    USAGE
}

fn of_lesson(lesson: &train::Error) -> u8 {
    match lesson {
        train::Error::Interrupted => INTERRUPTED,
        train::Error::Model(model::Error::NoRoom { .. }) => RESOURCE,
        train::Error::File(f) | train::Error::Model(model::Error::Format(f)) => of_file(f),
        _ => USAGE,
    }
}

fn of_file(f: &File) -> u8 {
    match f {
        File::DiskFull { .. } => RESOURCE,
        File::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => USAGE,
        File::Io { .. } => FAULT,
        _ => USAGE,
    }
}
