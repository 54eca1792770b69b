package trend

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// An hour of samples, one each 15 s: what a run of 75 minutes has after its warm-up.
const (
	every = 15 * time.Second
	hour  = 240
)

func series(n int, value func(i int, minutes float64) float64) []Sample {
	all := make([]Sample, n)
	for i := range all {
		at := time.Duration(i) * every
		all[i] = Sample{at, value(i, at.Minutes())}
	}
	return all
}

// collector is the memory of a Go program in MB: a saw whose teeth are uneven, noise that
// remembers, and a spike now and then.
func collector(r *rand.Rand) func() float64 {
	drift, tooth := 0., 0.
	return func() float64 {
		drift = .8*drift + .4*r.NormFloat64()
		if tooth += .2 + .3*r.Float64(); tooth > 3 {
			tooth = 0
		}
		spike := 0.
		if r.IntN(25) == 0 {
			spike = 10 * r.Float64()
		}
		return 28 + drift + tooth + spike
	}
}

// fds are mostly the same, with a command's pipes now and then.
func fds(r *rand.Rand) func() float64 {
	return func() float64 {
		n := 19.
		if r.IntN(6) == 0 {
			n += float64(1 + r.IntN(4))
		}
		return n
	}
}

var (
	inMemory = Limit{Share: .05, Least: 1}
	inFDs    = Limit{Least: 2}
)

// With 300 of each the shares are the same.
const tries = 20

// TestLeak: a real leak is found in each of many runs, below noise that is larger than it.
func TestLeak(t *testing.T) {
	for _, c := range []struct {
		name    string
		noise   func(*rand.Rand) func() float64
		leak    float64 // a minute
		limit   Limit
		atLeast int // of tries
	}{
		{"one descriptor a minute", fds, 1, inFDs, tries},
		{"one descriptor in ten minutes", fds, .1, inFDs, tries},
		{"50 kB a minute", collector, .05, inMemory, tries - 1},
		{"200 kB a minute", collector, .2, inMemory, tries},
	} {
		t.Run(c.name, func(t *testing.T) {
			found := 0
			for seed := range uint64(tries) {
				noise := c.noise(rand.New(rand.NewPCG(seed, 1)))
				f := Of(series(hour, func(_ int, minutes float64) float64 {
					return noise() + math.Floor(c.leak*minutes*1000)/1000
				}), c.limit)
				if f.Verdict == Grows {
					found++
				} else {
					t.Logf("seed %d: %v", seed, f)
				}
			}
			if found < c.atLeast {
				t.Errorf("found in %d of %d runs", found, tries)
			}
		})
	}
}

// TestNoise: noise alone is no leak, and does not hide one.
func TestNoise(t *testing.T) {
	for _, c := range []struct {
		name  string
		noise func(*rand.Rand) func() float64
		limit Limit
	}{
		{"descriptors", fds, inFDs},
		{"a garbage collector", collector, inMemory},
		{"nothing moves", func(*rand.Rand) func() float64 {
			return func() float64 { return 7 }
		}, Limit{}},
		{"a walk that comes back", func(r *rand.Rand) func() float64 {
			at := 0.
			return func() float64 { at = .9*at + .1*r.NormFloat64(); return 20 + at }
		}, inMemory},
	} {
		t.Run(c.name, func(t *testing.T) {
			var grows, noisy int
			for seed := range uint64(tries) {
				noise := c.noise(rand.New(rand.NewPCG(seed, 2)))
				f := Of(series(hour, func(int, float64) float64 { return noise() }), c.limit)
				switch f.Verdict {
				case Grows:
					grows++
					t.Logf("seed %d: %v", seed, f)
				case TooNoisy:
					noisy++
				case Flat:
				}
			}
			if grows > 0 || noisy > tries/20 {
				t.Errorf("of %d runs %d grow, %d are too noisy", tries, grows, noisy)
			}
		})
	}
}

// TestInterval: without the limit the interval alone has 0 in it as often as it says, also where
// samples remember; 99 of 100 are its promise, and correlation is estimated, too.
func TestInterval(t *testing.T) {
	for _, remember := range []float64{0, .5, .8} {
		missed := 0
		for seed := range uint64(tries) {
			r := rand.New(rand.NewPCG(seed, 3))
			at := 0.
			f := Of(series(hour, func(int, float64) float64 {
				at = remember*at + r.NormFloat64()
				return at
			}), Limit{})
			if f.Low > 0 || f.High < 0 {
				missed++
			}
		}
		if missed > tries/20 {
			t.Errorf("samples that remember %v: 0 is out of %d of %d intervals", remember, missed, tries)
		}
	}
}

// TestVerdict: each in its plainest form.
func TestVerdict(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	for _, c := range []struct {
		name    string
		samples []Sample
		limit   Limit
		want    Verdict
	}{
		{"too few", series(enough-1, func(int, float64) float64 { return 1 }), Limit{}, TooNoisy},
		{"none", nil, Limit{}, TooNoisy},
		{"all at once", make([]Sample, hour), Limit{}, TooNoisy},
		{"a line", series(hour, func(_ int, m float64) float64 { return m }), Limit{}, Grows},
		{"a line within the limit", series(hour, func(_ int, m float64) float64 { return 100 + m/60 }),
			Limit{Share: .02}, Flat},
		{"it falls", series(hour, func(_ int, m float64) float64 { return 100 - m }), Limit{}, Flat},
		{"a step", series(hour, func(i int, _ float64) float64 {
			return []float64{20, 21}[min(1, i/(hour/3))] + .01*r.NormFloat64()
		}), Limit{Least: 1.5}, Flat},
		{"noise in which nobody sees", series(hour, func(int, float64) float64 {
			return 1000 * r.NormFloat64()
		}), Limit{Least: 1}, TooNoisy},
		{"a quarter of the samples are wild", series(hour, func(i int, _ float64) float64 {
			if i%4 == 0 {
				return 1e6 * r.Float64()
			}
			return 10
		}), Limit{Least: 1}, Flat},
	} {
		if f := Of(c.samples, c.limit); f.Verdict != c.want {
			t.Errorf("%s: %v, want %v", c.name, f, c.want)
		}
	}
}

// TestPerHour: growth is over the span, the slope is by the hour.
func TestPerHour(t *testing.T) {
	f := Of(series(hour/2+1, func(_ int, m float64) float64 { return 3 * m }), Limit{})
	if math.Abs(f.Growth-90) > 1e-6 || math.Abs(f.PerHour()-180) > 1e-6 || f.Noise > 1e-6 {
		t.Errorf("%+v", f)
	}
}
