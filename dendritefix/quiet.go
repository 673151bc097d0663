package dendritefix

import (
	"context"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
)

// These are the time limits of the watch over quiet rooms. The roomserver processes an event that arrives asynchronously within lookAfter
// plus a lookTick, plus its own time for the event. docs/protocol.md promises eight seconds.
const (
	// lookAfter is how long an event may lie in a room's queue before QuietRooms looks. It is longer than the time for which an ending
	// worker ignores its queue. After it the worker is gone, and waking the room starts a new one.
	lookAfter = 6 * time.Second
	// lookTick is the pause between two searches for rooms whose look is due.
	lookTick = 250 * time.Millisecond
	// lastLook is the longest pause between two looks into a queue that does not become empty.
	lastLook = time.Minute
	// lookTimeout is the time limit of one look.
	lookTimeout = 5 * time.Second
	// liveFor is a time for which the worker of a room certainly reads its queue after an event. Dendrite's workers read it for 55 seconds.
	liveFor = 50 * time.Second
	// maxWatched is how many rooms are watched. It bounds the memory to some ten megabytes.
	maxWatched = 50_000
)

// Queues are the roomserver's queues, one for each room.
type Queues interface {
	Backlog(ctx context.Context, roomID string) (inputqueue.Backlog, error)
	Wake(ctx context.Context, roomID string) error
}

// QuietRooms wraps a roomserver and makes sure that no event stays in the queue of a room in which nothing else happens.
//
// Dendrite ends a room's worker when nothing has arrived for a minute. In the last five seconds of that minute the worker ignores its
// queue, and the arrival of an event does not start another worker. The event stays in the queue until the room's next event arrives,
// although federation transactions have been answered with 200. This hits expiring events that run for a minute: in an otherwise quiet
// room, the closing event arrives in just these seconds.
//
// There are two remedies:
//
//   - A request that waits for the roomserver gives its event again after lookAfter. That starts a new worker.
//   - An event that arrives asynchronously, or that the roomserver gives to itself, is looked for after lookAfter. If it is still in the
//     queue, the room's worker is woken. A room has one look at a time, and none if another event arrived shortly before.
//
// This file can go when a worker of Dendrite takes everything out of its queue before it ends.
type QuietRooms struct {
	api.RoomserverInternalAPI
	queues Queues
	log    *logrus.Entry

	mu    sync.Mutex // guards rooms, and each watched
	rooms map[string]*watched

	stop    context.CancelFunc
	stopped sync.WaitGroup
}

// watched is a room for which an event arrived not long ago.
type watched struct {
	came  time.Time     // when the last event arrived
	look  time.Time     // the next look; zero if there is none
	pause time.Duration // before that look
	taken uint64        // Backlog.Taken at the last look
}

// NewQuietRooms returns a wrapper that looks after quiet rooms from Start on. The queues are those of inner.
func NewQuietRooms(inner api.RoomserverInternalAPI, q Queues) *QuietRooms {
	return &QuietRooms{
		RoomserverInternalAPI: inner,
		queues:                q, log: logrus.WithField("component", "expiration"), rooms: map[string]*watched{},
		stop: func() {},
	}
}

// InputRoomEvents implements api.InputRoomEventsAPI. Giving an event again is harmless: the roomserver ignores an event that it has sent.
func (q *QuietRooms) InputRoomEvents(ctx context.Context, req *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	if !req.Asynchronous && len(req.InputRoomEvents) == 1 && req.InputRoomEvents[0].Kind == api.KindNew &&
		!req.InputRoomEvents[0].HasState {
		again := *req
		again.Asynchronous = true
		impatient := time.AfterFunc(lookAfter, func() {
			guard.Run("giving an event to the roomserver again", func() {
				q.InputRoomEvents(ctx, &again, &api.InputRoomEventsResponse{})
			})
		})
		defer impatient.Stop()
	}
	q.RoomserverInternalAPI.InputRoomEvents(ctx, req, res)
	if req.Asynchronous {
		for _, input := range req.InputRoomEvents {
			q.came(input.Event.RoomID().String())
		}
	}
}

// PerformLeave implements api.ClientRoomserverAPI. The roomserver gives the event to itself, and waits until it is processed.
func (q *QuietRooms) PerformLeave(ctx context.Context, req *api.PerformLeaveRequest, res *api.PerformLeaveResponse) error {
	q.came(req.RoomID)
	return q.RoomserverInternalAPI.PerformLeave(ctx, req, res)
}

// PerformInvite implements api.ClientRoomserverAPI. The roomserver gives the event to itself, and waits until it is processed.
func (q *QuietRooms) PerformInvite(ctx context.Context, req *api.PerformInviteRequest) error {
	q.came(req.InviteInput.RoomID.String())
	return q.RoomserverInternalAPI.PerformInvite(ctx, req)
}

// Start starts the goroutine that looks into queues. It runs until ctx is done or Stop is called.
func (q *QuietRooms) Start(ctx context.Context) {
	ctx, q.stop = context.WithCancel(ctx)
	q.stopped.Go(func() {
		ticker := time.NewTicker(lookTick)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-ticker.C:
				for _, roomID := range q.due(now) {
					if !guard.Run("looking into a room's queue", func() { q.lookInto(ctx, roomID) }) {
						q.looked(roomID, inputqueue.Backlog{Waiting: 1})
					}
				}
			}
		}
	})
}

// Stop ends the goroutine and waits for it.
func (q *QuietRooms) Stop() {
	q.stop()
	q.stopped.Wait()
}

// came notes that an event was put into the queue of a room.
func (q *QuietRooms) came(roomID string) {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.rooms[roomID]
	if r == nil {
		if len(q.rooms) >= maxWatched {
			return
		}
		r = &watched{}
		q.rooms[roomID] = r
	}
	if soon := now.Add(lookAfter); now.Sub(r.came) > liveFor && (r.look.IsZero() || r.look.After(soon)) {
		r.look, r.pause = soon, lookAfter
	}
	r.came = now
}

// due returns the rooms to look into now, and forgets the rooms that need no look and have had no event for liveFor.
func (q *QuietRooms) due(now time.Time) (rooms []string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for roomID, r := range q.rooms {
		switch {
		case r.look.IsZero() && now.Sub(r.came) > liveFor:
			delete(q.rooms, roomID)
		case !r.look.IsZero() && !now.Before(r.look):
			rooms = append(rooms, roomID)
		}
	}
	return rooms
}

// lookInto looks into the queue of a room, and wakes the room's worker if no worker is making progress there. It plans the next look if
// something is left.
func (q *QuietRooms) lookInto(ctx context.Context, roomID string) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	b, err := q.queues.Backlog(ctx, roomID)
	if err != nil {
		b = inputqueue.Backlog{Waiting: 1} // look again
	} else if b.Waiting > 0 && (b.InWork == 0 || b.Taken == q.before(roomID)) {
		err = q.queues.Wake(ctx, roomID)
		q.log.WithField("room_id", roomID).Debug("Woke the roomserver's worker of a quiet room")
	}
	if err != nil {
		q.log.WithError(err).WithField("room_id", roomID).Warn("Failed to look after a quiet room, will try again")
	}
	q.looked(roomID, b)
}

// before returns how many messages had been taken out of a room's queue at the last look.
func (q *QuietRooms) before(roomID string) uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r := q.rooms[roomID]; r != nil {
		return r.taken
	}
	return 0
}

// looked notes what a look found. The pauses grow while a worker is busy for long, because each look may put a message into the queue.
func (q *QuietRooms) looked(roomID string, b inputqueue.Backlog) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.rooms[roomID]
	if r == nil {
		return
	}
	r.taken = b.Taken
	if b.Waiting == 0 {
		r.look, r.taken = time.Time{}, 0
		return
	}
	r.look = time.Now().Add(r.pause)
	r.pause = min(2*r.pause, lastLook)
}
