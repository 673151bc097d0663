package roomserver

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// The figures of the watch over quiet rooms. An event that comes asynchronously is seen within patience, one tick, and the time
// that the roomserver takes for it: docs/protocol.md says eight seconds.
const (
	// lookAfter is how long an event may lie in a room's queue before somebody looks. It is longer than a worker is deaf, so that
	// the worker is gone then, and a new one starts when it is woken.
	lookAfter = inputPatience
	// lookTick is how often is looked whether a look is due.
	lookTick = 250 * time.Millisecond
	// lastLook is the longest pause between two looks into a queue that does not become empty.
	lastLook = time.Minute
	// lookTimeout ends a look.
	lookTimeout = 5 * time.Second
	// liveFor is how long the worker of a room certainly listens after something came for the room. Dendrite's workers listen for
	// 55 seconds.
	liveFor = 50 * time.Second
	// maxWatched is how many rooms are watched, so that memory is bounded: some ten megabytes.
	maxWatched = 50_000
)

// quiet watches over events that come asynchronously into rooms in which nothing else happens.
//
// Dendrite ends a room's worker when nothing has come for a minute. In the last five seconds of that minute the worker takes
// nothing out of its queue any more, and the arrival of an event does not start another: the event lies there until the next one
// comes. Federation transactions were answered with 200 by then.
//
// So when an event comes, a while later it is looked whether it is still there, and if it is, the room's worker is woken. There is
// one look for a room at a time, and none if something else came shortly before.
type quiet struct {
	queues queues
	log    *logrus.Entry

	mu    sync.Mutex
	rooms map[string]*watched

	stop    context.CancelFunc
	stopped sync.WaitGroup
}

// watched is a room into which an event came not long ago.
type watched struct {
	came  time.Time     // the last one
	look  time.Time     // when it is looked next; zero if it need not be
	pause time.Duration // before that look
	taken uint64        // of the backlog at the last look
}

func newQuiet(q queues) *quiet {
	return &quiet{
		queues: q, log: logrus.WithField("component", "expiration"), rooms: map[string]*watched{},
		stop: func() {},
	}
}

// Start starts the goroutine that looks, until ctx is done or Stop is called.
func (q *quiet) Start(ctx context.Context) {
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
						q.looked(roomID, backlog{waiting: 1})
					}
				}
			}
		}
	})
}

// Stop ends the goroutine and waits for it.
func (q *quiet) Stop() {
	q.stop()
	q.stopped.Wait()
}

// came notes that something was put into the queue of a room.
func (q *quiet) came(roomID string) {
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

// due returns the rooms to look into now, and forgets those of which nothing is to be known any more.
func (q *quiet) due(now time.Time) (rooms []string) {
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

// lookInto looks whether anything lies in the queue of a room, and wakes the room's worker if nobody works on it. It plans the next
// look if something is left.
func (q *quiet) lookInto(ctx context.Context, roomID string) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	b, err := q.queues.backlog(ctx, roomID)
	if err != nil {
		b = backlog{waiting: 1} // look again
	} else if b.waiting > 0 && (b.inWork == 0 || b.taken == q.before(roomID)) {
		err = q.queues.wake(ctx, roomID)
		q.log.WithField("room_id", roomID).Debug("Woke the roomserver's worker of a quiet room")
	}
	if err != nil {
		q.log.WithError(err).WithField("room_id", roomID).Warn("Failed to look after a quiet room, will try again")
	}
	q.looked(roomID, b)
}

// before returns how many messages had been taken out of a room's queue at the last look.
func (q *quiet) before(roomID string) uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r := q.rooms[roomID]; r != nil {
		return r.taken
	}
	return 0
}

// looked notes what was found. While a worker has long work the pauses grow, so that the queue does not.
func (q *quiet) looked(roomID string, b backlog) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.rooms[roomID]
	if r == nil {
		return
	}
	r.taken = b.taken
	if b.waiting == 0 {
		r.look, r.taken = time.Time{}, 0
		return
	}
	r.look = time.Now().Add(r.pause)
	r.pause = min(2*r.pause, lastLook)
}
