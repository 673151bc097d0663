package index

import (
	"container/heap"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// loadChunk is how many timers are allocated at once while loading: 53 timers fill 8 KiB, which Go allocates without waste. The memory of a
// chunk is freed when all its timers have ended.
const loadChunk = 53

// Load adds the timer of a row that an earlier process wrote. If the row is claimed, the timer is Claimed, and nobody looks at it before it
// is handed over or scheduled. Otherwise it is Running, and scheduled for when it is due. It cannot be found until Link is called.
func (x *Index) Load(row Row, due time.Duration) *Timer {
	if len(x.chunk) == 0 {
		x.chunk = make([]Timer, loadChunk)
	}
	tm := &x.chunk[0]
	x.chunk = x.chunk[1:]
	x.add(tm, row, due)
	tm.phase = Running
	if row.Claimed {
		tm.phase = Claimed
	}
	x.loaded = append(x.loaded, tm)
	return tm
}

// Link makes all timers findable that were loaded into an empty index. The maps are filled concurrently, because with a million timers most
// of the time is spent waiting for memory. After an error the index is unusable.
func (x *Index) Link() error {
	var (
		linking sync.WaitGroup
		failed  atomic.Bool
	)
	for _, add := range []func(*Timer){
		x.addToken, x.addToState, x.addToSender, x.Repeatable,
		func(tm *Timer) {
			if tm.phase == Running {
				tm.wake = tm.Due
				x.wakes.Push(tm)
			}
		},
	} {
		linking.Go(func() {
			if !guard.Run("filling the index", func() {
				for _, tm := range x.loaded {
					add(tm)
				}
			}) {
				failed.Store(true)
			}
		})
	}
	linking.Wait()
	heap.Init(&x.wakes)
	x.chunk, x.loaded = nil, nil
	if failed.Load() {
		return errors.New("filling the index panicked")
	}
	return nil
}
