package dendritefix

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakequeue"
)

func watchedRooms(t *testing.T, r *fakequeue.Roomserver) *QuietRooms {
	q := NewQuietRooms(r, r)
	ctx, cancel := context.WithCancel(t.Context())
	q.Start(ctx)
	t.Cleanup(func() {
		cancel()
		q.Stop()
		r.Finish()
	})
	return q
}

// comes delivers an event of another server to the room.
func comes(t *testing.T, q *QuietRooms) {
	q.InputRoomEvents(t.Context(), &api.InputRoomEventsRequest{
		Asynchronous: true, InputRoomEvents: []api.InputRoomEvent{{Kind: api.KindNew, Event: callMember(t, `{}`)}},
	}, &api.InputRoomEventsResponse{})
}

// requireSeen waits until the room's queue is empty, for at most limit.
func requireSeen(t *testing.T, r *fakequeue.Roomserver, limit time.Duration) {
	t.Helper()
	for began := time.Now(); !r.Empty(testRoom); time.Sleep(10 * time.Millisecond) {
		require.Less(t, time.Since(began), limit)
	}
}

// An event that arrives in a quiet room is processed within seconds, whenever it arrives.
func TestQuietRoomsAreWatched(t *testing.T) {
	const promised = 8 * time.Second
	for quiet := 50 * time.Second; quiet < 65*time.Second; quiet += 500 * time.Millisecond {
		t.Run(fmt.Sprint(quiet), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := fakequeue.New(10 * time.Millisecond)
				q := watchedRooms(t, r)
				for range 3 { // after the room is forgotten, it all starts again
					comes(t, q)
					requireSeen(t, r, promised)
					time.Sleep(quiet)
					comes(t, q)
					requireSeen(t, r, promised)
					time.Sleep(2 * time.Minute)
				}
				q.mu.Lock()
				defer q.mu.Unlock()
				require.Empty(t, q.rooms, "quiet rooms are forgotten")
			})
		})
	}
}

func TestBusyRoomsAreNotWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := fakequeue.New(10 * time.Millisecond)
		q := watchedRooms(t, r)
		for range 1000 {
			comes(t, q)
			time.Sleep(time.Second)
		}
		require.Zero(t, r.Wakes())
	})
}

// A worker that takes minutes for an event gets few additional messages. An event that arrives after that is processed as soon as any
// other.
func TestLongWorkIsNotMadeLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := fakequeue.New(5 * time.Minute)
		q := watchedRooms(t, r)
		comes(t, q)
		comes(t, q)
		time.Sleep(5*time.Minute - time.Second)
		require.LessOrEqual(t, r.Wakes(), 10)
		r.Take(10 * time.Millisecond)
		time.Sleep(5*time.Minute + 58*time.Second)
		comes(t, q)
		requireSeen(t, r, 8*time.Second)
	})
}

func TestQuietRoomsOutliveFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := fakequeue.New(10 * time.Millisecond)
		q := watchedRooms(t, r)
		comes(t, q)
		time.Sleep(57 * time.Second)
		r.Panic()
		comes(t, q)
		time.Sleep(8 * time.Second)
		require.False(t, r.Panics(), "there was no look")
		r.Fail(true)
		time.Sleep(10 * time.Second)
		r.Fail(false)
		requireSeen(t, r, lastLook)
	})
}

func TestLeavingAQuietRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := fakequeue.New(10 * time.Millisecond)
		q := watchedRooms(t, r)
		comes(t, q)
		time.Sleep(57 * time.Second)
		began := time.Now()
		require.NoError(t, q.PerformLeave(t.Context(), &api.PerformLeaveRequest{RoomID: testRoom}, nil))
		require.Less(t, time.Since(began), 8*time.Second)
	})
}

// deaf is a roomserver whose worker notices an event only when the event is given again.
type deaf struct {
	api.RoomserverInternalAPI
	woken chan struct{}
}

func (d *deaf) InputRoomEvents(_ context.Context, req *api.InputRoomEventsRequest, _ *api.InputRoomEventsResponse) {
	if req.Asynchronous {
		close(d.woken)
	}
	<-d.woken
}

func TestInputIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		wrapper := NewQuietRooms(&deaf{woken: make(chan struct{})}, nil)
		wrapper.InputRoomEvents(t.Context(), &api.InputRoomEventsRequest{
			InputRoomEvents: []api.InputRoomEvent{{Kind: api.KindNew, Event: callMember(t, `{}`)}},
		}, &api.InputRoomEventsResponse{})
		require.Equal(t, lookAfter, time.Since(start))
	})
}
