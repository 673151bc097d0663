// Package patience makes the time limits of tests fit the machine.
//
// A limit says how long a test waits for what should happen before it fails. On a slow machine, or on one with other work, everything
// takes longer, and a constant limit would fail a correct server. So limits are multiplied by a factor that is measured once in
// each test binary. Bounds that the contract sets, for example how late an event may be closed, are not limits: they stay constants.
package patience

import (
	"hash/fnv"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// usual is what measure returns on a machine with two cores and nothing else to do.
	usual = 1200
	// most bounds the factor, so that a test which hangs fails in the end.
	most = 20
	// mostLife bounds the factor for life times, because a test waits until they are over.
	mostLife = 4
)

// For returns a time limit that fits the machine: d on an idle one, more on one that is slow or busy.
func For(d time.Duration) time.Duration { return time.Duration(float64(d) * min(factor(), most)) }

// Life returns for how many seconds an event lives that has to live until a test has done something with it.
func Life(seconds int) int { return int(math.Ceil(float64(seconds) * min(factor(), mostLife))) }

// factor is by how much slower the machine is than the usual one, and at least 1.
var factor = sync.OnceValue(func() float64 { return max(1, usual/measure()) })

// measure returns how many megabytes in a second two cores hash together. The hash is FNV-1a, which no processor has an instruction
// for. In a binary with the race detector it is slower, as everything is there.
func measure() float64 {
	const (
		period = 200 * time.Millisecond
		block  = 64 << 10
	)
	var (
		cores  sync.WaitGroup
		blocks atomic.Int64
	)
	began := time.Now()
	for range 2 {
		cores.Go(func() {
			hash, data := fnv.New64a(), make([]byte, block)
			for time.Since(began) < period {
				_, _ = hash.Write(data)
				blocks.Add(1)
			}
		})
	}
	cores.Wait()
	return float64(blocks.Load()*block) / (1 << 20) / time.Since(began).Seconds()
}
