// Package fakequeue is a roomserver for tests. Its workers read their queues, and ignore them, for as long as Dendrite's workers do.
package fakequeue

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
)

// Roomserver puts each event that it is given into the queue of the event's room.
type Roomserver struct {
	api.RoomserverInternalAPI
	RoomVersion gomatrixserverlib.RoomVersion

	mu    sync.Mutex // guards the fields below
	deal  time.Duration
	rooms map[string]*room
	wakes int
	fails bool
	panic bool
}

// New returns a roomserver that takes the time deal for each event.
func New(deal time.Duration) *Roomserver {
	return &Roomserver{RoomVersion: gomatrixserverlib.RoomVersionV10, deal: deal, rooms: map[string]*room{}}
}

type room struct {
	inputqueue.Backlog
	began time.Time // when the worker began to listen; zero if there is none
	busy  bool
}

const deafAfter, deafUntil = 55 * time.Second, 60 * time.Second

func (r *Roomserver) room(roomID string) *room {
	if r.rooms[roomID] == nil {
		r.rooms[roomID] = &room{}
	}
	return r.rooms[roomID]
}

// put puts a message into a room's queue, which makes Dendrite start a worker unless there is one.
func (r *Roomserver) put(roomID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	room := r.room(roomID)
	room.Waiting++
	if room.busy {
		return
	}
	if room.began.IsZero() || time.Since(room.began) >= deafUntil {
		room.began = time.Now()
	}
	if time.Since(room.began) < deafAfter {
		room.busy = true
		go r.work(room)
	}
}

func (r *Roomserver) work(room *room) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for room.Waiting > 0 {
		room.Waiting, room.InWork, room.Taken = room.Waiting-1, 1, room.Taken+1
		deal := r.deal
		r.mu.Unlock()
		time.Sleep(deal)
		r.mu.Lock()
		room.InWork, room.Done = 0, room.Taken
	}
	room.busy, room.began = false, time.Now()
}

// Backlog returns the backlog of a room, or fails or panics if Fail or Panic asked for that.
func (r *Roomserver) Backlog(_ context.Context, roomID string) (inputqueue.Backlog, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.panic:
		r.panic = false
		panic("in a query")
	case r.fails:
		return inputqueue.Backlog{}, errors.New("JetStream is away")
	}
	return r.room(roomID).Backlog, nil
}

// Wake wakes the worker of a room.
func (r *Roomserver) Wake(_ context.Context, roomID string) error {
	r.put(roomID)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wakes++
	return nil
}

// Wakes counts the calls of Wake.
func (r *Roomserver) Wakes() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.wakes
}

// Empty reports whether the roomserver has processed everything in a room's queue.
func (r *Roomserver) Empty(roomID string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.room(roomID).Empty()
}

// Take sets the time that the roomserver takes for each event that it starts from now on.
func (r *Roomserver) Take(deal time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.deal = deal
}

// Fail makes Backlog fail, or succeed again.
func (r *Roomserver) Fail(fails bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fails = fails
}

// Panic makes the next call of Backlog panic.
func (r *Roomserver) Panic() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.panic = true
}

// Panics reports whether a panic is still to come.
func (r *Roomserver) Panics() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.panic
}

// Finish returns when no worker is busy.
func (r *Roomserver) Finish() {
	busy := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return slices.ContainsFunc(slices.Collect(maps.Values(r.rooms)), func(room *room) bool { return room.busy })
	}
	for r.Take(0); busy(); {
		time.Sleep(time.Second)
	}
}

// InputRoomEvents implements api.InputRoomEventsAPI.
func (r *Roomserver) InputRoomEvents(_ context.Context, req *api.InputRoomEventsRequest, _ *api.InputRoomEventsResponse) {
	for _, e := range req.InputRoomEvents {
		r.put(e.Event.RoomID().String())
	}
}

// QueryRoomVersionForRoom implements api.RoomserverInternalAPI.
func (r *Roomserver) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return r.RoomVersion, nil
}

// PerformLeave implements api.ClientRoomserverAPI. It waits, as Dendrite's does.
func (r *Roomserver) PerformLeave(_ context.Context, req *api.PerformLeaveRequest, _ *api.PerformLeaveResponse) error {
	r.put(req.RoomID)
	for !r.Empty(req.RoomID) {
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}
