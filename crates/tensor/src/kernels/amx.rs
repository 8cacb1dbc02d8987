//! Intel's matrix tiles (AMX), for products of brain floats; everything else is AVX-512's.
//!
//! A tile register holds sixteen rows of 64 bytes. Weights already lie as one wants them: sixteen steps of a panel, each
//! sixteen pairs. Inputs lie token by token, sixteen steps at a time (see [`super::FloatTiles::together`]). An
//! instruction adds sixteen steps: first the even and the odd columns by themselves, then both to the sum, so sums
//! depend on the length alone, but differ in their last bits from those of other instruction sets.

use super::{Arithmetic, FloatTiles, Kernels, Tile, avx512};
use crate::packed::form::{Form, LANES};
use std::{
    arch::{asm, x86_64::__cpuid_count},
    cell::Cell,
};

/// Steps (pairs of columns) that an instruction adds.
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

static KERNELS: Kernels = Kernels { isa: "amx", floats: FLOATS, ..avx512::BRAIN_TABLE };

const FLOATS: FloatTiles =
    FloatTiles { run, brain_widths: &[1, 2, 4, 8, 16, 32], together: STEPS, spin, ..avx512::BRAIN_TABLE.floats };

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
    /// Tokens that the registers of this thread are set up for; 0 where they are not.
    static TOKENS: Cell<u8> = const { Cell::new(0) };
}

/// Sets the registers of this thread up for so many tokens: 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 weights.
fn set_up(tokens: u8) {
    if TOKENS.get() == tokens {
        return;
    }
    let mut shapes = Shapes { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for i in 0..8 {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = if i < 6 { tokens } else { STEPS as u8 };
    }
    // SAFETY: the table exists only where the instruction does, and the shapes are ones that it allows.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, preserves_flags, readonly)) };
    TOKENS.set(tokens);
}

/// # Safety
/// As of the kernels' `run`.
unsafe fn run(tile: &Tile) {
    if tile.form != Form::Bf16 {
        // SAFETY: the caller's.
        return unsafe { (avx512::BRAIN_TABLE.floats.run)(tile) };
    }
    let (halves, tokens) = if tile.width > STEPS { (2, STEPS) } else { (1, tile.width) };
    set_up(tokens as u8);
    // SAFETY: the caller's tile holds so many panels.
    unsafe {
        for panel in (0..tile.panels).step_by(2) {
            match (halves, tile.panels - panel) {
                (1, 1) => panels::<1, 1>(tile, panel),
                (1, _) => panels::<1, 2>(tile, panel),
                (_, 1) => panels::<2, 1>(tile, panel),
                _ => panels::<2, 2>(tile, panel),
            }
        }
    }
}

/// Multiplies `H` halves of the tokens with `R` panels.
///
/// # Safety
/// As of the kernels' `run`, and the registers are set up.
unsafe fn panels<const H: usize, const R: usize>(tile: &Tile, panel: usize) {
    // SAFETY: the caller's tile holds the panels, inputs and sums; a rest of the steps is multiplied from a copy, as what
    // lies behind it is another panel's.
    unsafe {
        let weights = tile.weights.add(panel * tile.panel_bytes);
        let out = tile.out.add(panel * tile.steps[0]);
        let (second, stride) = (out.add(tile.steps[0]), 4 * tile.steps[1]);
        let lower = stride * STEPS;
        if tile.add {
            asm!("tileloadd tmm0, [{} + {}*1]", in(reg) out, in(reg) stride, options(nostack, preserves_flags));
            if R == 2 {
                asm!("tileloadd tmm1, [{} + {}*1]", in(reg) second, in(reg) stride, options(nostack, preserves_flags));
            }
            if H == 2 {
                let out = out.byte_add(lower);
                asm!("tileloadd tmm2, [{} + {}*1]", in(reg) out, in(reg) stride, options(nostack, preserves_flags));
            }
            if H == 2 && R == 2 {
                let out = second.byte_add(lower);
                asm!("tileloadd tmm3, [{} + {}*1]", in(reg) out, in(reg) stride, options(nostack, preserves_flags));
            }
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        }
        let (blocks, rest) = (tile.length / STEPS, tile.length % STEPS);
        let input_step = 64 * tile.width;
        multiply::<H, R>(weights, tile.panel_bytes, tile.inputs, input_step, blocks);
        if rest > 0 {
            let mut copy = Rest([0; 2 * REGISTER]);
            for r in 0..R {
                let from = weights.add(r * tile.panel_bytes + blocks * REGISTER);
                from.copy_to_nonoverlapping(copy.0.as_mut_ptr().add(r * REGISTER), 64 * rest);
            }
            multiply::<H, R>(copy.0.as_ptr(), REGISTER, tile.inputs.add(blocks * input_step), input_step, 1);
        }
        asm!("tilestored [{} + {}*1], tmm0", in(reg) out, in(reg) stride, options(nostack, preserves_flags));
        if R == 2 {
            asm!("tilestored [{} + {}*1], tmm1", in(reg) second, in(reg) stride, options(nostack, preserves_flags));
        }
        if H == 2 {
            let out = out.byte_add(lower);
            asm!("tilestored [{} + {}*1], tmm2", in(reg) out, in(reg) stride, options(nostack, preserves_flags));
        }
        if H == 2 && R == 2 {
            let out = second.byte_add(lower);
            asm!("tilestored [{} + {}*1], tmm3", in(reg) out, in(reg) stride, options(nostack, preserves_flags));
        }
    }
}

/// The last steps of two panels, with zeros behind them.
#[repr(align(64))]
struct Rest([u8; 2 * REGISTER]);

/// Adds `blocks` times sixteen steps to the sums.
///
/// # Safety
/// The registers are set up, and the pointers hold so many blocks.
#[inline(always)]
unsafe fn multiply<const H: usize, const R: usize>(
    weights: *const u8,
    panel_bytes: usize,
    inputs: *const u8,
    input_step: usize,
    blocks: usize,
) {
    if blocks == 0 {
        return;
    }
    // The loop is one block of assembly: a compiler that knows nothing of the registers cannot come between.
    macro_rules! turns {
        ($($line:literal)*) => {
            asm!(
                "2:",
                $($line,)*
                "add {w}, 1024",
                "add {x}, {step}",
                "dec {n}",
                "jnz 2b",
                w = inout(reg) weights => _,
                x = inout(reg) inputs => _,
                n = inout(reg) blocks => _,
                panel = in(reg) panel_bytes,
                step = in(reg) input_step,
                line = in(reg) 64usize,
                options(nostack, readonly)
            )
        };
    }
    // SAFETY: the caller's blocks.
    unsafe {
        match (H, R) {
            (1, 1) => turns!(
                "tileloadd tmm6, [{w} + {line}*1]"
                "tileloadd tmm4, [{x} + {line}*1]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "/* {panel} */"
            ),
            (1, _) => turns!(
                "tileloadd tmm4, [{x} + {line}*1]"
                "tileloadd tmm6, [{w} + {line}*1]"
                "add {w}, {panel}"
                "tileloadd tmm7, [{w} + {line}*1]"
                "sub {w}, {panel}"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm4, tmm7"
            ),
            (_, 1) => turns!(
                "tileloadd tmm6, [{w} + {line}*1]"
                "tileloadd tmm4, [{x} + {line}*1]"
                "tileloadd tmm5, [{x} + {line}*1 + 1024]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "/* {panel} */"
            ),
            _ => turns!(
                "tileloadd tmm6, [{w} + {line}*1]"
                "tileloadd tmm4, [{x} + {line}*1]"
                "add {w}, {panel}"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{w} + {line}*1]"
                "sub {w}, {panel}"
                "tdpbf16ps tmm1, tmm4, tmm7"
                "tileloadd tmm5, [{x} + {line}*1 + 1024]"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
        }
    }
}

/// Multiplies in registers: brain floats and bytes in tiles, floats as AVX-512 does.
fn spin(what: Arithmetic, turns: usize) -> f32 {
    if what == Arithmetic::F32 {
        return (avx512::BRAIN_TABLE.floats.spin)(what, turns);
    }
    set_up(STEPS as u8);
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
