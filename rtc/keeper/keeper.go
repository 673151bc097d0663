package keeper

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// SFU is what is asked of LiveKit. livekit.ErrNotFound is an answer. Every other error means that LiveKit does not answer.
type SFU interface {
	// CreateRoom makes a room, or returns the one that is there.
	CreateRoom(ctx context.Context, name string) (livekit.Room, error)
	Room(ctx context.Context, name string) (livekit.Room, error)
	// Participants returns the sessions in a room. There are none if the room is not there.
	Participants(ctx context.Context, room string) ([]livekit.Session, error)
	Remove(ctx context.Context, p livekit.Participant) error
}

// Timers is what is asked of the engine, see *expiration.Timers.
type Timers interface {
	Find(ctx context.Context, k expiration.Kept, owner, roomID string) (expiration.Delegation, error)
	Delegate(ctx context.Context, d expiration.Delegation) error
	Delegations(ctx context.Context) ([]expiration.Delegation, error)
	Supersede(ctx context.Context, older, newer expiration.Kept) error
	NoteSession(ctx context.Context, notes []expiration.SessionNote) error
	KeepAlive(ctx context.Context, k expiration.Kept) error
	Finish(ctx context.Context, k expiration.Kept) error
}

const (
	// minTokenDuration is the least duration of a timer whose token can be handed over.
	minTokenDuration = 10 * time.Second
	// waitingOfUser is how many timers of one user may wait to be taken over. Each is a write of its own, and with tokens needs no login.
	waitingOfUser = 32
	// stopPatience is how long Stop waits for steps in progress.
	stopPatience = 5 * time.Second
)

var (
	// ErrTooShort: the duration of the token's timer is too short to be kept alive by an SFU.
	ErrTooShort = errors.New("the duration is too short")
	// ErrCrowded: too many timers of one user wait to be taken over.
	ErrCrowded = keylock.ErrCrowded
	// ErrStopped: the keeper is not running.
	ErrStopped = errors.New("the keeper is not running")

	errPanic = errors.New("a panic, which is logged")
)

// Keeper keeps timers alive. The package comment says what it guarantees.
type Keeper struct {
	sfu     SFU
	timers  Timers
	store   Store
	rooms   Rooms
	wall    func() time.Time // the time of day, which alone means something to other processes
	metrics *metrics
	log     *logrus.Entry

	users *keylock.Locks[string] // by user ID: one delegation of a user is accepted at a time
	rows  *keylock.Locks[int64]  // by timer: one step, or one change of its row, at a time

	wakeup  chan struct{} // has capacity 1; signals that there may be something to do
	remover chan struct{} // the same for the goroutine that removes participants
	ctx     context.Context
	stop    context.CancelFunc
	workers sync.WaitGroup // all goroutines

	// mu guards the fields below, and all delegations and calls. Nothing is called or waited for while it is held.
	mu                     sync.Mutex
	kept                   map[int64]*delegation // by timer
	ofMember               map[[32]byte]*delegation
	calls                  map[string]*call // by the name of LiveKit's room
	looks, keeps, finishes queue
	finishing              map[string]int                   // how many finishPlaces each user has
	silentSince            time.Time                        // when LiveKit stopped to answer, or zero
	joined                 map[livekit.Participant]struct{} // participants whose membership is to be looked at
}

// call is a room of LiveKit with delegations.
type call struct {
	name        string
	delegations map[*delegation]struct{}
	task        task // the next look at it
	hinted      bool // something has happened since the last look began
	// checked has the SIDs of the sessions whose membership was looked at since checkedAt.
	checked   map[string]struct{}
	checkedAt time.Time
}

// New returns a keeper. It does nothing before Start.
func New(sfu SFU, timers Timers, store Store, rooms Rooms) *Keeper {
	k := &Keeper{
		sfu: sfu, timers: timers, store: store, rooms: rooms, wall: failpoint.WallClock,
		log:   logrus.WithField("component", "rtc"),
		users: keylock.WithPlaces[string](1, 1+waitingOfUser), rows: keylock.New[int64](),
		wakeup: make(chan struct{}, 1), remover: make(chan struct{}, 1),
		kept: map[int64]*delegation{}, ofMember: map[[32]byte]*delegation{}, calls: map[string]*call{},
		looks: queue{free: lookPlaces}, keeps: queue{free: keepPlaces}, finishes: queue{free: finishPlaces},
		finishing: map[string]int{}, joined: map[livekit.Participant]struct{}{},
	}
	k.metrics = newMetrics(func() float64 {
		k.mu.Lock()
		defer k.mu.Unlock()
		return float64(len(k.kept))
	})
	return k
}

// Collectors returns the keeper's metrics, to be registered once.
func (k *Keeper) Collectors() []prometheus.Collector { return k.metrics.collectors() }

// Start takes up all delegations, and works until Stop is called or ctx is done. The timers must have been started before.
func (k *Keeper) Start(ctx context.Context) error {
	rows, err := k.timers.Delegations(ctx)
	if err != nil {
		return fmt.Errorf("loading the delegations: %w", err)
	}
	now, wall := time.Now(), k.wall()
	k.mu.Lock()
	for _, row := range rows {
		k.addWithMu(load(row, now, wall))
	}
	k.mu.Unlock()
	k.ctx, k.stop = context.WithCancel(ctx)
	k.workers.Go(func() { guard.KeepGoing(k.ctx, "watching over calls", k.watch) })
	k.workers.Go(func() { guard.KeepGoing(k.ctx, "removing participants", k.remove) })
	return nil
}

// Stop ends the keeper's work. It waits for steps in progress, at most for stopPatience. The next Start takes up the rest. Stop may be called
// more than once.
func (k *Keeper) Stop() {
	if k.stop == nil {
		return
	}
	k.stop()
	ended := make(chan struct{})
	go func() { k.workers.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(stopPatience):
	}
}

// Warnings says what is wrong, for the health check: LiveKit does not answer, although it has to be asked.
func (k *Keeper) Warnings() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.silentSince.IsZero() {
		return nil
	}
	return []string{fmt.Sprintf("calls: LiveKit has not answered since %s", k.silentSince.UTC().Format(time.RFC3339))}
}

// Leave is a delayed leave event that a user hands over.
type Leave struct {
	UserID, RoomID string // of the event
	DelayID        string
	// MemberKey identifies the member of a slot whose leave it is, and is never zero.
	MemberKey [32]byte
	// Participant is the member at LiveKit.
	livekit.Participant
}

// DelegateLeave takes over a delayed leave. It returns nil when that is durable. Of one member's leaves the newest counts, and an older
// one for the same state is cancelled. The error is expiration.ErrNotFound if the event is not scheduled, or is of another user or room, or
// ErrCrowded. Any other error is passing.
func (k *Keeper) DelegateLeave(ctx context.Context, l Leave) error {
	return k.delegate(ctx, expiration.Kept{Hash: expiration.HashToken(l.DelayID), Delayed: true}, l.UserID, l.RoomID,
		func(row *expiration.Delegation) error {
			row.MemberKey, row.Room, row.Identity = l.MemberKey, l.Room, l.Identity
			return nil
		})
}

// DelegateToken takes over the timer of an expiring event. It returns nil when that is durable. participant returns the name at LiveKit of
// the event's sender, or an error that refuses the request. The error is expiration.ErrNotFound if no such timer runs, ErrTooShort, the
// error of participant, ErrCrowded, or passing.
func (k *Keeper) DelegateToken(
	ctx context.Context, h expiration.TokenHash, participant func(userID, roomID string) (livekit.Participant, error),
) error {
	return k.delegate(ctx, expiration.Kept{Hash: h}, "", "", func(row *expiration.Delegation) error {
		if row.Duration < minTokenDuration {
			return ErrTooShort
		}
		p, err := participant(row.UserID, row.RoomID)
		row.Room, row.Identity = p.Room, p.Identity
		return err
	})
}

// delegate takes over a timer. complete adds to its row who the participant is.
func (k *Keeper) delegate(
	ctx context.Context, timer expiration.Kept, owner, roomID string, complete func(*expiration.Delegation) error,
) error {
	if k.ctx == nil || k.ctx.Err() != nil {
		return ErrStopped
	}
	row, err := k.timers.Find(ctx, timer, owner, roomID)
	if err != nil {
		return fmt.Errorf("looking for a timer to take over: %w", err)
	}
	if err = complete(&row); err != nil {
		return err
	}
	// The newest row of a member in the table must be the newest in memory, and all rows of a member are one user's.
	leave, err := k.users.Lock(ctx, row.UserID)
	if err != nil {
		return err
	}
	defer leave()
	unlock, err := k.rows.Lock(ctx, row.NID)
	if err != nil {
		return err
	}
	defer unlock()
	if known, err := k.repeated(row); known {
		return err
	}
	if older, ok := k.older(row); ok {
		if err = k.timers.Supersede(ctx, older, row.Kept); err != nil {
			return err
		}
	}
	row.Taken, row.Phase = k.wall().Truncate(time.Millisecond), expiration.DelegationWaiting
	if err = k.timers.Delegate(ctx, row); err != nil {
		return fmt.Errorf("storing a delegation: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.endWithMu(k.kept[row.NID], "replaced")
	k.endWithMu(k.ofMember[row.MemberKey], "replaced")
	k.addWithMu(accept(row, time.Now()))
	return nil
}

// older returns the timer of the same member's delegation that row replaces, if there is one.
func (k *Keeper) older(row expiration.Delegation) (timer expiration.Kept, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.ofMember[row.MemberKey]; d != nil && d.row.NID != row.NID {
		return d.row.Kept, true
	}
	return expiration.Kept{}, false
}

// repeated reports whether the same was accepted before. The error is ErrNotFound if the timer is about to end.
func (k *Keeper) repeated(row expiration.Delegation) (known bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.kept[row.NID]
	switch {
	case d == nil:
		return false, nil
	case d.phase == gone:
		return true, expiration.ErrNotFound
	}
	same := d.row.MemberKey == row.MemberKey && d.row.Room == row.Room && d.row.Identity == row.Identity
	if same {
		d.resize(row.Duration, time.Now())
		k.planWithMu(&d.task)
	}
	return same, nil
}

// addWithMu adds a delegation.
func (k *Keeper) addWithMu(d *delegation) {
	c := k.calls[d.row.Room]
	if c == nil {
		c = &call{name: d.row.Room, delegations: map[*delegation]struct{}{}}
		c.task = task{do: func() { k.look(c) }, next: func() (*queue, time.Time) { return &k.looks, c.next() }}
		k.calls[c.name] = c
	}
	c.delegations[d] = struct{}{}
	d.call = c
	d.task = task{do: func() { k.act(d) }, next: func() (*queue, time.Time) {
		_, at := d.next()
		if d.phase == gone {
			return &k.finishes, at
		}
		return &k.keeps, at
	}}
	k.kept[d.row.NID] = d
	if d.row.MemberKey != [32]byte{} {
		k.ofMember[d.row.MemberKey] = d
	}
	k.planWithMu(&d.task)
	k.planWithMu(&c.task)
}

// endWithMu removes a delegation, if there is one. how is the value of the metric.
func (k *Keeper) endWithMu(d *delegation, how string) {
	if d == nil || d.phase == over {
		return
	}
	d.end(time.Now())
	delete(k.kept, d.row.NID)
	if k.ofMember[d.row.MemberKey] == d {
		delete(k.ofMember, d.row.MemberKey)
	}
	k.planWithMu(&d.task)
	delete(d.call.delegations, d)
	k.planWithMu(&d.call.task)
	if len(d.call.delegations) == 0 {
		delete(k.calls, d.call.name)
	}
	if len(k.calls) == 0 { // nobody will ask LiveKit again
		k.silentSince = time.Time{}
	}
	k.metrics.ended.WithLabelValues(how).Inc()
}

// next returns when to look at the room, or zero.
func (c *call) next() (at time.Time) {
	for d := range c.delegations {
		if !d.lookAt.IsZero() && (at.IsZero() || d.lookAt.Before(at)) {
			at = d.lookAt
		}
	}
	if c.hinted && !at.IsZero() {
		return time.Now()
	}
	return at
}

// Hint notes what LiveKit's webhook has reported. It never waits. A hint only brings forward what would be done anyway, so it does not matter
// if it is late, repeated or lost.
func (k *Keeper) Hint(e livekit.Event) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	switch e.Kind {
	case livekit.ParticipantJoined:
		k.joinedWithMu(e.Participant)
		k.hintWithMu(e.Participant, now.Add(rejoinDoubt), false)
	case livekit.ParticipantLeft, livekit.ParticipantAborted:
		k.joinedWithMu(e.Participant) // LiveKit has given it a new token, although it was there for a moment only
		var until time.Time
		if slices.Contains(returning, e.Reason) {
			until = now.Add(grace)
		}
		k.hintWithMu(e.Participant, until, true)
	case livekit.RoomFinished:
		k.hintWithMu(livekit.Participant{Room: e.Room}, time.Time{}, false)
	default:
		return
	}
	k.metrics.hints.WithLabelValues(string(e.Kind)).Inc()
}

// hintWithMu has a room looked at now. Its participant may be missing in passing until a time. left says that its session has ended.
func (k *Keeper) hintWithMu(p livekit.Participant, until time.Time, left bool) {
	c := k.calls[p.Room]
	if c == nil {
		return
	}
	for d := range c.delegations {
		if d.row.Identity == p.Identity {
			d.mayReturn(until)
			if left {
				d.left = time.Now()
			}
		}
	}
	c.hinted = true
	k.planWithMu(&c.task)
}

// signal wakes the receiver of a channel with capacity 1.
func signal(wakeup chan struct{}) {
	select {
	case wakeup <- struct{}{}:
	default:
	}
}

// sleep waits, until ctx is done at most.
func sleep(ctx context.Context, long time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(long):
	}
}
