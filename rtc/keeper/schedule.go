package keeper

import (
	"container/heap"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// What is done next, and how much at a time.

const (
	// lookPlaces is how many rooms are looked at at a time, keepPlaces how many timers are restarted and noted, and finishPlaces how many end.
	// Each has its own, because a look takes seconds while LiveKit hangs, and an end while the roomserver does.
	lookPlaces, keepPlaces, finishPlaces = 4, 4, 8
	// userPlaces is how many of the finishPlaces one user may have. Another's leave need not wait for rooms that hang.
	userPlaces = 2
	// longestSleep bounds the harm of a lost wake-up.
	longestSleep = time.Minute
	// panicPause is the pause after a panic in our own code, whose cause is still there.
	panicPause = time.Second
)

// task is something that is done again and again.
type task struct {
	do func()
	// next returns when it is to be done, and in which queue. The time is zero if it is not to be done.
	next func() (*queue, time.Time)

	queue   *queue // in which it waits or is being done, or nil
	at      time.Time
	place   int // in the queue's heap
	running bool
}

// queue has the tasks of one kind, in the order of their times.
type queue struct {
	tasks taskHeap
	free  int // how many more may be done at the same time
}

type taskHeap []*task

func (h taskHeap) Len() int           { return len(h) }
func (h taskHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h taskHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

func (h *taskHeap) Push(x any) {
	t := x.(*task)
	t.place = len(*h)
	*h = append(*h, t)
}

func (h *taskHeap) Pop() any {
	last := len(*h) - 1
	t := (*h)[last]
	(*h)[last], *h = nil, (*h)[:last]
	return t
}

// planWithMu puts a task where it belongs after a change. A task that is being done is put there when it is done.
func (k *Keeper) planWithMu(t *task) {
	if t.running {
		return
	}
	if t.queue != nil {
		heap.Remove(&t.queue.tasks, t.place)
	}
	if t.queue, t.at = t.next(); t.at.IsZero() {
		t.queue = nil
		return
	}
	heap.Push(&t.queue.tasks, t)
	if t.place == 0 {
		signal(k.wakeup)
	}
}

// watch has each task done when its time has come.
func (k *Keeper) watch() {
	alarm := time.NewTimer(0)
	defer alarm.Stop()
	for {
		select {
		case <-k.ctx.Done():
			return
		case <-k.wakeup:
		case <-alarm.C:
		}
		alarm.Reset(k.dispatch(time.Now()))
	}
}

// dispatch begins with all tasks whose time has come, as far as there are places, and returns the time until it must be called again.
func (k *Keeper) dispatch(now time.Time) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	sleep := longestSleep
	for _, q := range []*queue{&k.looks, &k.keeps, &k.finishes} {
		for q.free > 0 && len(q.tasks) > 0 {
			t := q.tasks[0]
			if wait := t.at.Sub(now); wait > 0 {
				sleep = min(sleep, wait)
				break
			}
			heap.Pop(&q.tasks)
			t.running = true
			q.free--
			k.workers.Go(func() { k.work(t) })
		}
	}
	return sleep
}

func (k *Keeper) work(t *task) {
	defer k.returned(t)
	if !guard.Run("keeping timers alive", t.do) {
		sleep(k.ctx, panicPause)
	}
}

// returned notes that a task is done for now.
func (k *Keeper) returned(t *task) {
	k.mu.Lock()
	defer k.mu.Unlock()
	t.queue.free++
	t.queue, t.running = nil, false
	k.planWithMu(t)
	signal(k.wakeup) // a place is free
}
