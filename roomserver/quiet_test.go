package roomserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
)

// deafQueues are the queues of a roomserver whose workers listen for as long as Dendrite's do.
type deafQueues struct {
	mu    sync.Mutex
	deal  time.Duration // how long a message takes
	rooms map[string]*deafRoom
	wakes int
	fails bool
	panic bool

	out, heard uint64 // of the output stream
}

type deafRoom struct {
	backlog
	began time.Time // when the worker began to listen; zero if there is none
	busy  bool
}

const deafAfter, deafUntil = 55 * time.Second, 60 * time.Second

func (d *deafQueues) room(roomID string) *deafRoom {
	r := d.rooms[roomID]
	if r == nil {
		r = &deafRoom{}
		d.rooms[roomID] = r
	}
	return r
}

// put puts a message into a room's queue, which makes Dendrite start a worker unless there is one.
func (d *deafQueues) put(roomID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.room(roomID)
	r.waiting++
	if r.busy {
		return
	}
	if r.began.IsZero() || time.Since(r.began) >= deafUntil {
		r.began = time.Now()
	}
	if time.Since(r.began) < deafAfter {
		r.busy = true
		go d.work(r)
	}
}

func (d *deafQueues) work(r *deafRoom) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for r.waiting > 0 {
		r.waiting, r.inWork, r.taken = r.waiting-1, 1, r.taken+1
		deal := d.deal
		d.mu.Unlock()
		time.Sleep(deal)
		d.mu.Lock()
		r.inWork, r.done = 0, r.taken
	}
	r.busy, r.began = false, time.Now()
}

func (d *deafQueues) backlog(_ context.Context, roomID string) (backlog, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.panic:
		d.panic = false
		panic("in a query")
	case d.fails:
		return backlog{}, errors.New("JetStream is away")
	}
	return d.room(roomID).backlog, nil
}

func (d *deafQueues) wake(_ context.Context, roomID string) error {
	d.put(roomID)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wakes++
	return nil
}

// is reads or writes something under the lock.
func (d *deafQueues) is(f func() bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f()
}

func (d *deafQueues) set(f func()) { d.is(func() bool { f(); return true }) }

func (d *deafQueues) empty(roomID string) bool {
	return d.is(func() bool { return d.room(roomID).backlog.empty() })
}

func (d *deafQueues) written(context.Context) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out, nil
}

func (d *deafQueues) read(context.Context) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.heard, nil
}

// inner is the roomserver: whatever it is given goes into the queue.
type inner struct {
	api.RoomserverInternalAPI
	*deafQueues
	version gomatrixserverlib.RoomVersion
}

func (i *inner) InputRoomEvents(_ context.Context, req *api.InputRoomEventsRequest, _ *api.InputRoomEventsResponse) {
	for _, e := range req.InputRoomEvents {
		i.put(e.Event.RoomID().String())
	}
}

func (i *inner) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return i.version, nil
}

func (i *inner) PerformLeave(_ context.Context, req *api.PerformLeaveRequest, _ *api.PerformLeaveResponse) error {
	i.put(req.RoomID)
	for !i.empty(req.RoomID) {
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

const testRoom = "!room:example.org"

func newTestQueue(t *testing.T, d *deafQueues) *Queue {
	d.rooms = map[string]*deafRoom{}
	i := &inner{deafQueues: d, version: gomatrixserverlib.RoomVersionV10}
	q := &Queue{RoomserverInternalAPI: i, quiet: newQuiet(d), settled: newSettled(d, i)}
	ctx, cancel := context.WithCancel(t.Context())
	q.Start(ctx)
	t.Cleanup(func() {
		cancel()
		q.Stop()
		d.set(func() { d.deal = 0 })
		for d.is(func() bool {
			return slices.ContainsFunc(slices.Collect(maps.Values(d.rooms)), func(r *deafRoom) bool { return r.busy })
		}) {
			time.Sleep(time.Second)
		}
	})
	return q
}

// comes is an event of another server that comes for the room.
func (q *Queue) comes(t *testing.T) {
	e := newEvent(t, "", `{}`)
	require.Equal(t, testRoom, e.RoomID().String())
	q.InputRoomEvents(t.Context(), &api.InputRoomEventsRequest{
		Asynchronous: true, InputRoomEvents: []api.InputRoomEvent{{Kind: api.KindNew, Event: e}},
	}, &api.InputRoomEventsResponse{})
}

// seenAfter returns how long it takes until nothing is left in the room's queue.
func (d *deafQueues) seenAfter(t *testing.T, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	for !d.empty(testRoom) {
		require.Less(t, time.Since(began), limit)
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

// Whenever an event comes into a quiet room, it is seen within seconds.
func TestQuietRoomsAreWatched(t *testing.T) {
	const promised = 8 * time.Second
	for quiet := 50 * time.Second; quiet < 65*time.Second; quiet += 500 * time.Millisecond {
		t.Run(fmt.Sprint(quiet), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &deafQueues{deal: 10 * time.Millisecond}
				q := newTestQueue(t, d)
				for range 3 { // each time anew
					q.comes(t)
					d.seenAfter(t, promised)
					time.Sleep(quiet)
					q.comes(t)
					d.seenAfter(t, promised)
					time.Sleep(2 * time.Minute)
				}
				q.quiet.mu.Lock()
				defer q.quiet.mu.Unlock()
				require.Empty(t, q.quiet.rooms, "what is quiet is forgotten")
			})
		})
	}
}

func TestBusyRoomsAreNotWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deafQueues{deal: 10 * time.Millisecond}
		q := newTestQueue(t, d)
		for range 1000 {
			q.comes(t)
			time.Sleep(time.Second)
		}
		require.True(t, d.is(func() bool { return d.wakes == 0 }))
	})
}

// A worker that takes minutes for an event is not given much more, and what comes when it is done at last is seen as soon.
func TestLongWorkIsNotMadeLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deafQueues{deal: 5 * time.Minute}
		q := newTestQueue(t, d)
		q.comes(t)
		q.comes(t)
		time.Sleep(5*time.Minute - time.Second)
		require.True(t, d.is(func() bool { return d.wakes <= 10 }))
		d.set(func() { d.deal = 10 * time.Millisecond })
		time.Sleep(5*time.Minute + 58*time.Second)
		q.comes(t)
		d.seenAfter(t, 8*time.Second)
	})
}

func TestQuietRoomsOutliveFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deafQueues{deal: 10 * time.Millisecond}
		q := newTestQueue(t, d)
		q.comes(t)
		time.Sleep(57 * time.Second)
		d.set(func() { d.panic = true })
		q.comes(t)
		time.Sleep(8 * time.Second)
		require.True(t, d.is(func() bool { return !d.panic }), "there was no look")
		d.set(func() { d.fails = true })
		time.Sleep(10 * time.Second)
		d.set(func() { d.fails = false })
		d.seenAfter(t, lastLook)
	})
}

func TestLeavingAQuietRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deafQueues{deal: 10 * time.Millisecond}
		q := newTestQueue(t, d)
		q.comes(t)
		time.Sleep(57 * time.Second)
		began := time.Now()
		require.NoError(t, q.PerformLeave(t.Context(), &api.PerformLeaveRequest{RoomID: testRoom}, nil))
		require.Less(t, time.Since(began), 8*time.Second)
	})
}
