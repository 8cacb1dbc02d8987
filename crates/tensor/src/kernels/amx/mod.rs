//! Intel's matrix tiles (AMX); what is no product of many numbers is AVX-512's.
//!
//! A tile register holds up to sixteen rows of up to 64 bytes. Weights already lie as one wants them: sixteen steps of a
//! panel, each sixteen times four bytes. Inputs lie token by token (see [`super::FloatTiles::together`] and
//! [`super::Tile`]). Sums of codes are whole numbers and give the bits of AVX-512. An instruction for brain floats adds sixteen
//! steps: first the even and the odd columns by themselves, then both to the sum, so sums depend on the length alone, but
//! differ in their last bits from those of other instruction sets.
//!
//! The language has no words for these instructions yet, so they are assembly; no compiled code touches the registers.

mod brain;
mod codes;

use super::{Arithmetic, CodeTiles, FloatTiles, Kernels, avx512};
use crate::packed::form::LANES;
use std::{
    arch::{asm, x86_64::__cpuid_count},
    cell::Cell,
};

/// Steps (of four bytes) that an instruction adds.
const STEPS: usize = 16;
/// Bytes of a tile register.
const REGISTER: usize = 1024;

/// The table, where this machine has the instructions and the system lets a process use the registers.
pub fn kernels() -> Option<&'static Kernels> {
    let edx = __cpuid_count(7, 0).edx;
    let has = |bit: u32| edx >> bit & 1 == 1;
    let (brain, tiles, bytes) = (has(22), has(24), has(25));
    (avx512::kernels().is_some() && brain && tiles && bytes && permitted()).then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: "amx",
    floats: FloatTiles {
        run: brain::run,
        brain_widths: &[1, 2, 4, 8, 16, 32],
        together: STEPS,
        spin,
        ..avx512::BRAIN_TABLE.floats
    },
    codes: CodeTiles {
        run: codes::run,
        widths: &[1, 2, 4, 8, 12, 16, 32],
        opens_from: usize::MAX,
        ..avx512::BRAIN_TABLE.codes
    },
    ..avx512::BRAIN_TABLE
};

/// Asks the system for the registers, which are 8 KiB more of state for every thread that uses them.
fn permitted() -> bool {
    const REQUEST: i32 = 0x1023;
    const TILE_DATA: u64 = 18;
    // SAFETY: the call takes two numbers and changes nothing but what instructions this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

/// What the tile registers of a thread hold: see the processor's manual, `LDTILECFG`.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    /// What the registers of this thread are set up for: tokens, and bytes of an input.
    static SHAPES: Cell<(u8, u8)> = const { Cell::new((0, 0)) };
}

/// Sets the registers of this thread up for so many tokens and so many bytes of each: 0 to 3 hold sums, 4 and 5 inputs,
/// 6 and 7 weights.
fn set_up(tokens: u8, bytes: u8) {
    if SHAPES.get() == (tokens, bytes) {
        return;
    }
    let mut shapes = Shapes { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for i in 0..8 {
        shapes.row_bytes[i] = if i == 4 || i == 5 { bytes.into() } else { 64 };
        shapes.rows[i] = if i < 6 { tokens } else { bytes / 4 };
    }
    // SAFETY: the table exists only where the instruction does, and the shapes are ones that it allows.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, preserves_flags, readonly)) };
    SHAPES.set((tokens, bytes));
}

/// What two registers hold.
#[repr(align(64))]
struct Rest([u8; 2 * REGISTER]);

/// Multiplies in registers: brain floats and bytes in tiles, floats as AVX-512 does.
fn spin(what: Arithmetic, turns: usize) -> f32 {
    if what == Arithmetic::F32 {
        return (avx512::BRAIN_TABLE.floats.spin)(what, turns);
    }
    set_up(STEPS as u8, 64);
    let zeros = Rest([0; 2 * REGISTER]);
    let steps = if what == Arithmetic::Int8 { 4 * STEPS } else { 2 * STEPS };
    // As many operations as so many turns are, four instructions at a time.
    let blocks = (turns * what.operations() / (2 * LANES * STEPS * steps)).div_ceil(4);
    macro_rules! turns {
        ($($line:literal)*) => {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tileloadd tmm4, [{x} + {line}*1]",
                "tileloadd tmm5, [{x} + {line}*1]",
                "tileloadd tmm6, [{x} + {line}*1]",
                "tileloadd tmm7, [{x} + {line}*1]",
                "2:",
                $($line,)*
                "dec {n}",
                "jnz 2b",
                x = in(reg) zeros.0.as_ptr(),
                line = in(reg) 64usize,
                n = inout(reg) blocks.max(1) => _,
                options(nostack, readonly)
            )
        };
    }
    // SAFETY: the registers are set up, and the zeros fill one.
    unsafe {
        if what == Arithmetic::Int8 {
            turns!("tdpbssd tmm0, tmm4, tmm6" "tdpbssd tmm1, tmm4, tmm7" "tdpbssd tmm2, tmm5, tmm6" "tdpbssd tmm3, tmm5, tmm7");
        } else {
            turns!(
                "tdpbf16ps tmm0, tmm4, tmm6" "tdpbf16ps tmm1, tmm4, tmm7" "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"
            );
        }
    }
    0.0
}
