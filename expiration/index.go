package expiration

import (
	"container/heap"
	"maps"
	"slices"
	"sync"
	"time"
)

// timer is a Timer in memory.
type timer struct {
	event    Event
	hash     TokenHash
	received time.Time

	// row is held around each write to the timer's row, so that what memory says of the row is what was written last.
	row sync.Mutex

	// The rest is guarded by Timers.mu; claim, deadline and duration change only while row is held as well.

	duration time.Duration
	deadline time.Time // as the row has it: the wall clock, whole milliseconds
	due      time.Time // the same moment by the monotonic clock
	claim    *Claim
	// unsure is set when a claim failed so that it may have been written all the same.
	unsure bool
	// confirmed is set when the roomserver has said that the event is in its room, since the process started.
	confirmed bool
	// unsent is set when the roomserver has failed to take the event, until it turns out that it has it.
	unsent bool
	// unknown counts how many times in a row the roomserver has said that it does not know the event.
	unknown int
	// pending is set until the roomserver has answered: the event may not be in its room yet.
	pending bool
	// gone is set when the timer is out of the index, but for index.left.
	gone bool
	// refused is set while the token of a timer that is gone is still answered otherwise than an unknown one.
	refused bool
	// failures counts the attempts that failed since the last one that did not; it makes the pauses grow.
	failures int
	// wake is when the scheduler looks at the timer. A refresh moves only due: the scheduler finds out when it looks.
	wake time.Time
	// place is the timer's index in the heap, or -1.
	place int
}

// running reports whether the token is valid.
func (tm *timer) running() bool { return !tm.gone && tm.claim == nil }

// index finds timers by all that they are asked for by. It has no lock of its own: Timers.mu guards it.
type index struct {
	byToken map[TokenHash]*timer
	byEvent map[string]*timer
	byState map[StateKey][]*timer
	byUser  map[string]map[*timer]struct{}
	// byRequest has the timers, gone or not, of requests of which Dendrite's memory does not know what came of them: those
	// of earlier processes, and those that failed.
	byRequest map[RequestHash]*timer
	// left has the timers that are gone and whose rows could not be deleted.
	left  map[*timer]struct{}
	wakes wakeHeap
}

func newIndex() index {
	return index{
		byToken: map[TokenHash]*timer{},
		byEvent: map[string]*timer{},
		byState: map[StateKey][]*timer{},
		byUser:  map[string]map[*timer]struct{}{},

		byRequest: map[RequestHash]*timer{},
		left:      map[*timer]struct{}{},
	}
}

func (x *index) add(tm *timer) {
	x.byToken[tm.hash] = tm
	x.byEvent[tm.event.ID] = tm
	if s, ok := tm.event.State(); ok {
		x.byState[s] = append(x.byState[s], tm)
	}
	timers := x.byUser[tm.event.Sender]
	if timers == nil {
		timers = map[*timer]struct{}{}
		x.byUser[tm.event.Sender] = timers
	}
	timers[tm] = struct{}{}
}

// remove takes out what add put in, and may be called again.
func (x *index) remove(tm *timer) {
	if tm.gone {
		return
	}
	tm.gone = true
	x.unschedule(tm)
	delete(x.byToken, tm.hash)
	delete(x.byEvent, tm.event.ID)
	if s, ok := tm.event.State(); ok {
		x.byState[s] = slices.DeleteFunc(x.byState[s], func(other *timer) bool { return other == tm })
		if len(x.byState[s]) == 0 {
			delete(x.byState, s)
		}
	}
	timers := x.byUser[tm.event.Sender]
	delete(timers, tm)
	if len(timers) == 0 {
		delete(x.byUser, tm.event.Sender)
	}
}

// refuse remembers the token of a timer that is gone, until the scheduler looks at it.
func (x *index) refuse(tm *timer, until time.Time) {
	tm.refused = true
	x.byToken[tm.hash] = tm
	x.schedule(tm, until)
}

// forget ends what refuse began.
func (x *index) forget(tm *timer) {
	tm.refused = false
	delete(x.byToken, tm.hash)
}

// forgetRequests forgets the requests whose timers are gone.
func (x *index) forgetRequests() {
	maps.DeleteFunc(x.byRequest, func(_ RequestHash, tm *timer) bool { return tm.gone })
}

// schedule makes the scheduler look at the timer at wake.
func (x *index) schedule(tm *timer, wake time.Time) {
	tm.wake = wake
	if tm.place < 0 {
		heap.Push(&x.wakes, tm)
	} else {
		heap.Fix(&x.wakes, tm.place)
	}
}

func (x *index) unschedule(tm *timer) {
	if tm.place >= 0 {
		heap.Remove(&x.wakes, tm.place)
	}
}

// wakeHeap has the timer that is looked at next in front.
type wakeHeap []*timer

func (h wakeHeap) Len() int           { return len(h) }
func (h wakeHeap) Less(i, j int) bool { return h[i].wake.Before(h[j].wake) }
func (h wakeHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

func (h *wakeHeap) Push(x any) {
	tm := x.(*timer)
	tm.place = len(*h)
	*h = append(*h, tm)
}

func (h *wakeHeap) Pop() any {
	last := len(*h) - 1
	tm := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	tm.place = -1
	return tm
}
