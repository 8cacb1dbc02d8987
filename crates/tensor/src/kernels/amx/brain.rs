//! Products of brain floats in tiles.

use super::{REGISTER, Rest, STEPS, set_up};
use crate::{
    kernels::{Tile, avx512},
    packed::form::Form,
};
use std::arch::asm;

/// # Safety
/// As of the kernels' `run`.
pub(super) unsafe fn run(tile: &Tile) {
    if tile.form != Form::Bf16 {
        // SAFETY: the caller's.
        return unsafe { (avx512::BRAIN_TABLE.floats.run)(tile) };
    }
    let (halves, tokens) = if tile.width > STEPS { (2, STEPS) } else { (1, tile.width) };
    set_up(tokens as u8, 64);
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
