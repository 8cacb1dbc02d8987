//! Loops that do nothing but multiply in registers, or nothing but read: what an instruction set can do at most.

use super::lanes::Lanes;

/// Independent sums: enough to hide the latency of every product.
const SUMS: usize = 12;

/// Which limit of the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Signed bytes with unsigned bytes.
    Int8,
    /// Pairs of brain floats.
    Bf16,
    /// 32-bit floats.
    F32,
}

impl Arithmetic {
    /// Operations (multiplications and additions) of one turn of [`spin`].
    pub const fn operations(self) -> usize {
        let per_lane = match self {
            Arithmetic::Int8 => 8,
            Arithmetic::Bf16 => 4,
            Arithmetic::F32 => 2,
        };
        SUMS * 16 * per_lane
    }
}

/// Multiplies `turns` times; the result only keeps the loop alive.
///
/// # Safety
/// The processor has the instructions of `V`, and the pointer holds so many bytes.
#[inline(always)]
pub(crate) unsafe fn spin<V: Lanes>(what: Arithmetic, turns: usize) -> f32 {
    let x = std::hint::black_box([1u8; 64]);
    let mut out = [0f32; 16];
    // SAFETY: reads and writes stay inside the two arrays.
    unsafe {
        let w = V::bytes(x.as_ptr());
        let pair = V::splat_int(x.as_ptr());
        let mut sums = [V::zero(); SUMS];
        if what == Arithmetic::Int8 {
            let mut dots = [V::splat_int(x.as_ptr()); SUMS];
            for _ in 0..turns {
                for dot in &mut dots {
                    // What a product is made of must not be made once for all of them.
                    let again = std::hint::black_box(x.as_ptr());
                    let pair = if V::FUSED { pair } else { V::splat_int(again) };
                    *dot = V::dot(*dot, w, pair);
                }
            }
            for (sum, dot) in sums.iter_mut().zip(dots) {
                *sum = V::to_floats(dot);
            }
        } else {
            let f = V::splat(x.as_ptr());
            for _ in 0..turns {
                for sum in &mut sums {
                    *sum = match what {
                        Arithmetic::Bf16 => V::bf16_dot(*sum, w, x.as_ptr()),
                        _ => V::fma(V::splat(x.as_ptr()), f, *sum),
                    };
                }
            }
        }
        for sum in sums {
            V::store(out.as_mut_ptr(), V::fma(sum, sum, V::load(out.as_ptr())));
        }
    }
    // All lanes count: of those that do not, nobody would multiply the half that a register holds.
    out.iter().sum()
}

/// Reads `len` bytes (a multiple of 512) once; the result only keeps the loop alive.
///
/// # Safety
/// The processor has the instructions of `V`, and the pointer holds so many bytes.
#[inline(always)]
pub(crate) unsafe fn read<V: Lanes>(p: *const u8, len: usize) -> f32 {
    let mut out = [0f32; 16];
    // SAFETY: the caller's bytes, eight registers at a time.
    unsafe {
        let mut seen = [V::and(V::bytes(p), 0); 8];
        for at in (0..len).step_by(512) {
            for (i, seen) in seen.iter_mut().enumerate() {
                *seen = V::or(*seen, V::bytes(p.add(at + 64 * i)));
            }
        }
        let mut dots = V::to_ints(V::zero());
        for seen in seen {
            dots = V::dot(dots, V::and(seen, 127), V::splat_int([1u8; 4].as_ptr()));
        }
        V::store(out.as_mut_ptr(), V::to_floats(dots));
    }
    out[0]
}
