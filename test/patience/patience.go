// Package patience adapts the time limits of tests to the machine.
//
// A limit says how long a test waits for an expected result before it fails. On a slow or busy machine everything takes longer, and a
// constant limit would fail a correct server. So limits are multiplied by a factor, which each test binary measures once. Bounds from
// docs/protocol.md, for example how late an event may be closed, are not limits: they stay constant.
package patience

import (
	"hash/fnv"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// usual is the result of measure on an idle machine with two cores.
	usual = 1200
	// most bounds the factor, so that a test that hangs fails in the end.
	most = 20
	// mostLife bounds the factor for life times, because a test waits until they are over.
	mostLife = 4
)

// For returns a time limit for this machine: d on an idle machine, more on a slow or busy one.
func For(d time.Duration) time.Duration { return time.Duration(float64(d) * min(factor(), most)) }

// Life returns an event's life time for this machine, in seconds. It is long enough for the test to act before the event expires.
func Life(seconds int) int { return int(math.Ceil(float64(seconds) * min(factor(), mostLife))) }

// factor says how many times slower than the usual machine this one is. It is at least 1.
var factor = sync.OnceValue(func() float64 { return max(1, usual/measure()) })

// measure returns how many megabytes per second two cores hash together. The hash is FNV-1a, because no processor has an instruction for
// it. The race detector slows down the measurement, as it slows down the tests.
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
