package expiration

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
)

// Config is what the component itself can be told; see docs/configuration.md.
type Config struct {
	// MaxRunningPerUser is how many timers one user may have running.
	MaxRunningPerUser int
	// MaxScheduledPerUser is how many delayed events one user may have scheduled.
	MaxScheduledPerUser int
	// KeepFinalised is for how long a delayed event can be looked up that was finalised, and MaxFinalisedPerUser for how many
	// of one user.
	KeepFinalised       time.Duration
	MaxFinalisedPerUser int
	// RestartGrace is how long after Start every timer runs at least, so that live clients can refresh first. 0: timers
	// that ran out while the server was down fire at once.
	RestartGrace time.Duration
	// TokenLimit limits the requests with one token, or one delay ID.
	TokenLimit RateLimit
}

const (
	// pollInterval is how long a lost wake-up can delay anything.
	pollInterval = 5 * time.Second
	// sweepPause is how long the rows of closed events are gathered before they are deleted: so that when many timers run out at
	// once, this work comes after the claims. A crash meanwhile brings their closing events to the roomserver again.
	sweepPause = time.Second
	// lookAgainAfter is how long after something was told of a piece of state it is looked at once more.
	lookAgainAfter = time.Second
	// recoverTimeout is how long Start waits for what an earlier process claimed and did not finish.
	recoverTimeout = 10 * time.Second
	// stopPatience is how long Stop waits for the closings that are under way.
	stopPatience = 5 * time.Second
	// firstPause is the pause after the first failed attempt; it doubles with each further one up to lastPause.
	firstPause = 500 * time.Millisecond
	lastPause  = 30 * time.Second
	// manyTimers is from how many timers on their loading leaves memory behind that is worth giving back.
	manyTimers = 10_000
	// maxFailures is as far as failures are counted.
	maxFailures = 16
	// refusedFor is how long the token of a sender who is gone is told so at /end, before it is a token like any unknown
	// one.
	refusedFor = 5 * time.Minute
	// retriedFor is how long at least a request is known whose timer is gone; Dendrite itself knows those that went well for
	// as long.
	retriedFor = 30 * time.Minute
	// givenUpAfter is how many times in a row the roomserver can say that it does not know an event. With lastPause between them
	// it is more than an hour, in which the roomserver's queue brings what a crash has left in it.
	givenUpAfter = 125
	// lostAfter is the same for state that was set back behind an event. It is more than seven minutes: Dendrite's queue brings what a
	// crash has left in it after five. Who is gone from a call is not to be seen there for longer than need be.
	lostAfter = 20
	// unsentFactor times as many timers as may be running can a user have whose events the roomserver has failed to take, or
	// does not know.
	unsentFactor = 10
)

// Timers is the component. See the package comment for what it guarantees.
type Timers struct {
	cfg        Config
	store      Store
	roomserver Roomserver
	tokens     *Tokens
	metrics    *metrics
	log        *logrus.Entry
	clock      clock

	reads     *batch.Batches[int64, *Timer]
	refreshes *batch.Batches[Refresh, bool]
	claims    *batch.Batches[ConditionalClaim, bool]
	drops     *batch.Batches[int64, struct{}]
	deletes   *batch.Batches[int64, struct{}]
	doubts    *batch.Batches[int64, struct{}]

	closings *keylock.Locks[int64]  // by the timers' NIDs
	states   *keylock.Locks[uint64] // by the hashes of the pieces of state
	requests *keylock.Locks[RequestHash]
	rows     *keylock.Locks[int64] // by the timers' NIDs
	lanes    *lanes.Lanes

	wakeup  chan struct{} // of capacity 1: the first wake has come nearer
	ctx     context.Context
	stop    context.CancelFunc
	watcher sync.WaitGroup // started by Start, ended by Stop after the lanes' turns; and what these leave to be done behind them

	mu       sync.Mutex // guards what follows
	index    *index
	answered time.Duration // when the roomserver was done last with an event that it was given; 0 at first
	// attempts has the pieces of state whose locks attempts have.
	attempts map[uint64]struct{}
	swept    []ref                  // closed events whose rows sweep deletes; if there are any, it is on its way
	forgot   time.Duration          // when requests were forgotten last
	claimed  map[string]sentDelayed // the delayed events that are claimed and not finalised, by the IDs of the events
	senders  map[uint64]struct{}    // the hashes of the users with finalised events that were sent
}

// New returns the component. It does nothing before Start.
func New(cfg Config, store Store, roomserver Roomserver, tokens *Tokens) *Timers {
	t := &Timers{
		cfg: cfg, store: store, roomserver: roomserver, tokens: tokens,
		log:       logrus.WithField("component", "expiration"),
		clock:     newClock(),
		reads:     batch.New(store.Read),
		refreshes: batch.New(store.Refresh),
		claims:    batch.New(store.Claim),
		drops:     batch.New(batch.WithoutAnswers(store.Drop)),
		deletes:   batch.New(batch.WithoutAnswers(store.Delete)),
		doubts:    batch.New(batch.WithoutAnswers(store.Doubt)),
		closings:  keylock.New[int64](),
		states:    keylock.New[uint64](),
		requests:  keylock.New[RequestHash](),
		rows:      keylock.New[int64](),
		wakeup:    make(chan struct{}, 1),
		index:     newIndex(),
		attempts:  map[uint64]struct{}{},
		claimed:   map[string]sentDelayed{},
		senders:   map[uint64]struct{}{},
		lanes:     lanes.New(lanes.EarlyEvery),
	}
	gauge := func(read func(*index) int) func() float64 {
		return func() float64 {
			t.mu.Lock()
			defer t.mu.Unlock()
			return float64(read(t.index))
		}
	}
	t.metrics = newMetrics(
		gauge(func(x *index) int { return x.count - x.delayed }), gauge(func(x *index) int { return x.delayed }),
	)
	return t
}

// Collectors returns the component's metrics, to be registered once.
func (t *Timers) Collectors() []prometheus.Collector { return t.metrics.collectors() }

// Start loads the timers, finishes what an earlier process had claimed, and starts to watch the deadlines, until Stop is
// called or ctx is done. It must return before events are sent or tokens used.
func (t *Timers) Start(ctx context.Context) error {
	unfinished, err := t.loadAll(ctx)
	if err != nil {
		return fmt.Errorf("loading the timers of expiring events: %w", err)
	}
	failpoint.Pass(failpoint.AfterLoad)
	t.run(ctx, unfinished)
	return nil
}

// unfinished is what an earlier process had begun with timers.
type unfinished struct {
	claimed []ref
	// doubted are those of state events that may have been replaced.
	doubted []ref
}

// loadAll reads into memory what an earlier process had, and returns what it had begun.
func (t *Timers) loadAll(ctx context.Context) (u unfinished, err error) {
	if u, err = t.loadTimers(ctx); err != nil {
		return u, err
	}
	t.mu.Lock()
	many := t.index.count >= manyTimers
	t.mu.Unlock()
	if many {
		debug.FreeOSMemory() // what the rows took; the index takes less
	}
	return u, t.loadSenders(ctx)
}

// loadTimers takes all timers in. Those that are claimed it reads whole, and those whose digests were made under another key, or
// that have none because somebody doubted them, or an earlier version wrote them.
func (t *Timers) loadTimers(ctx context.Context) (u unfinished, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, key := t.clock.now(), t.tokens.names.id()
	t.forgot = now
	var whole []int64
	doubted := map[int64]bool{}
	if err = t.store.Index(ctx, func(row Indexed) error {
		if row.Claimed || row.Digest.get(digestKey) != key {
			whole = append(whole, row.NID)
			if row.Digest == (Digest{}) {
				doubted[row.NID] = true
			}
			return nil
		}
		_, err := t.take(row, now)
		return err
	}); err != nil {
		return u, err
	}
	for nids := range slices.Chunk(whole, batch.Max) {
		rows, err := t.store.Read(ctx, nids)
		if err != nil {
			return u, err
		}
		for _, row := range rows {
			if row == nil {
				continue
			}
			r, err := t.take(newIndexed(*row, t.tokens.Digest(*row)), now)
			if err != nil {
				return u, err
			}
			switch {
			case row.Claim == nil:
				if row.Delayed == nil && row.Event.StateKey != nil && doubted[row.NID] {
					u.doubted = append(u.doubted, r)
				}
				continue
			case row.Delayed != nil:
				t.claimed[row.Claim.Event.EventID] = sentDelayed{r, row.Event.Sender, row.Event.ID}
			}
			u.claimed = append(u.claimed, r)
		}
	}
	if !t.index.link() {
		return u, errors.New("the index could not be made")
	}
	return u, nil
}

// take takes in a timer that an earlier process had. Timers.mu is held.
func (t *Timers) take(row Indexed, now time.Duration) (r ref, err error) {
	if err = t.index.room(); err != nil {
		return r, err
	}
	due := t.clock.moment(row.Deadline)
	overdue := due <= now
	if t.cfg.RestartGrace > 0 {
		due = max(due, now+t.cfg.RestartGrace)
	}
	r = t.index.put(row, due)
	// Of what is overdue nobody knows yet whether it ever came into its room; if it did, it is closed soon, or refreshed.
	tm := t.index.at(r)
	tm.unsent = overdue && !tm.delayed
	return r, nil
}

// run is Start when everything is loaded.
func (t *Timers) run(ctx context.Context, u unfinished) {
	t.ctx, t.stop = context.WithCancel(ctx)
	for _, r := range u.doubted {
		t.supersede(r)
	}
	t.recover(u.claimed)
	t.watcher.Go(func() { guard.KeepGoing(t.ctx, "watching the deadlines", t.watch) })
	t.watcher.Go(func() { guard.KeepGoing(t.ctx, "pruning", t.prune) })
}

// Stop lets the closings that are under way come to their end, within stopPatience and while the context of Start lasts,
// and ends all goroutines. What is left is taken up by the next Start. Stop may be called more than once.
func (t *Timers) Stop() {
	if t.stop == nil {
		return
	}
	t.lanes.Stop()
	impatient := time.AfterFunc(stopPatience, t.stop)
	defer impatient.Stop()
	t.lanes.Wait()
	t.stop()
	t.watcher.Wait()
}

// Ping reports whether the component can reach its database.
func (t *Timers) Ping(ctx context.Context) error { return t.store.Ping(ctx) }

// Token returns the refresh token of an event, running or not.
func (t *Timers) Token(eventID string) string { return t.tokens.Token(eventID) }

// LockState waits for the lock of a piece of state and returns the function that gives it back. It is held while an
// event for that state is built and given to the roomserver. A closing event that an earlier fault left half done is
// finished first, so that it does not come behind what is sent now.
//
// Neither that nor an attempt that has the lock and has claimed is waited for much longer than sendPatience: an event that the roomserver
// does not answer must not keep others from sending. Without the lock both are built upon the same events, and state resolution prefers
// the send, which bears the later time. Where it goes by power first, an attempt is waited for until it ends, and another send always.
func (t *Timers) LockState(ctx context.Context, s StateKey) (unlock func(), err error) {
	state := t.tokens.names.state(s)
	for unlock == nil {
		switch unlock, err = t.lockSoon(ctx, state); {
		case err == nil:
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !decidesWhoMay(s.Type) && t.halfDone(state):
			time.Sleep(2 * time.Millisecond) // so that what is sent now bears a later time
			return func() {}, nil
		}
	}
	patient, cancel := context.WithTimeout(ctx, sendPatience)
	defer cancel()
	for _, r := range t.unfinished(state) {
		err = t.attempt(patient, r, Expired, nil)
		t.removeRow(ctx, r)
		if err != nil && !isFinal(err) {
			t.log.WithError(err).WithField("room_id", s.RoomID).Debug("A send goes past an event that is half done")
		}
	}
	return unlock, nil
}

// decidesWhoMay reports whether state resolution orders events of a type by the power of their senders, and not by time.
func decidesWhoMay(eventType string) bool {
	switch eventType {
	case "m.room.power_levels", "m.room.join_rules", "m.room.member":
		return true
	}
	return false
}

// lockSoon is the lock of a piece of state, unless it takes longer than sendPatience.
func (t *Timers) lockSoon(ctx context.Context, state uint64) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, sendPatience)
	defer cancel()
	return t.states.Lock(ctx, state)
}

// halfDone reports whether an attempt has the lock of a piece of state, and has claimed its event. One that has not may build its event
// later than a send that goes past it, and overwrite what is sent.
func (t *Timers) halfDone(state uint64) (claimed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.attempts[state]; !ok {
		return false
	}
	t.index.ofState(state, func(_ ref, tm *timer) { claimed = claimed || tm.claimed && !tm.gone })
	return claimed
}

// Pending is a timer whose event is on its way into the room.
type Pending struct {
	t       *Timers
	timer   ref
	existed bool // the timer is that of an equal event, which another request sent
}

// Begin stores the timer of an event that is about to be given to the roomserver. The deadline is the given duration,
// which must be positive, from now. The limit of running timers does not hold for exempt users; for others the error is
// a *LimitError when it is reached. A timer that the new event replaces does not count, nor does, within bounds, one whose
// event the roomserver has failed to take, or does not know: most likely it never runs.
func (t *Timers) Begin(ctx context.Context, e Event, duration time.Duration, exempt bool) (*Pending, error) {
	r, existed, err := t.insert(ctx, Timer{Event: e, Duration: duration}, exempt)
	if err != nil {
		return nil, err
	}
	return &Pending{t: t, timer: r, existed: existed}, nil
}

// insert takes a timer in and stores it, with the deadline counted from now. The scheduler does not look at it yet. It may be
// there already: equal messages, built in the same millisecond upon the same events, are one event.
func (t *Timers) insert(ctx context.Context, row Timer, exempt bool) (r ref, existed bool, err error) {
	now := t.clock.now()
	due := now + row.Duration
	row.TokenHash = HashToken(t.tokens.Token(row.Event.ID))
	row.Received, row.Deadline = t.clock.stored(now), t.clock.stored(due)
	digest := t.tokens.Digest(row)

	t.mu.Lock()
	for same := t.index.token(row.TokenHash, row.Delayed != nil); t.index.at(same) != nil && !t.index.at(same).gone; {
		t.mu.Unlock()
		// Its row may be on its way, and fail to come. Whoever is told that there is a timer relies on the row.
		unlock, err := t.lockRow(ctx, same)
		if err != nil {
			return ref{}, false, err
		}
		unlock()
		t.mu.Lock()
		if tm := t.index.at(same); tm != nil && !tm.gone {
			t.mu.Unlock()
			return same, true, nil
		}
		same = t.index.token(row.TokenHash, row.Delayed != nil)
	}
	err = t.index.room()
	if err == nil && !exempt {
		err = t.overLimit(row.Delayed != nil, digest, now)
	}
	if err != nil {
		t.mu.Unlock()
		return ref{}, false, err
	}
	row.NID = t.index.lastNID + 1
	// Whoever finds the timer from now on waits until it is decided whether there is a row. Nobody has the lock of a new number, so
	// that nothing is waited for here.
	unlock, _ := t.rows.Lock(context.Background(), row.NID)
	defer unlock()
	r = t.index.add(newIndexed(row, digest), due)
	t.index.at(r).pending = true
	t.mu.Unlock()
	if err = t.write(ctx, r, row, digest); err != nil {
		return ref{}, false, err
	}
	return r, false, nil
}

// write writes the row of a new timer under the row's lock, and takes the timer out if that fails.
func (t *Timers) write(ctx context.Context, r ref, row Timer, d Digest) (err error) {
	written := false
	defer func() { // also after a panic
		if written {
			return
		}
		t.mu.Lock()
		t.index.remove(r)
		t.mu.Unlock()
		t.metrics.errors.WithLabelValues("insert").Inc()
		t.removeRowLocked(ctx, r) // it may have been written all the same
	}()
	failpoint.Pass(failpoint.BeforeInsert)
	if err = t.store.Insert(ctx, row, d); err != nil {
		return fmt.Errorf("storing the timer of %s: %w", row.Event.ID, err)
	}
	written = true
	failpoint.Pass(failpoint.AfterInsert)
	return nil
}

// overLimit returns an error if the sender may not have another timer of this kind. Timers.mu is held.
func (t *Timers) overLimit(delayed bool, d Digest, now time.Duration) error {
	var (
		state         uint64
		count, unsent int
		first         time.Duration
	)
	limit := t.cfg.MaxScheduledPerUser
	if !delayed {
		limit, state = t.cfg.MaxRunningPerUser, d.get(digestState)
	}
	t.index.ofSender(d.get(digestSender), func(_ ref, tm *timer) {
		if tm.delayed != delayed || tm.superseded {
			return
		}
		if end := max(tm.due, tm.wake); count+unsent == 0 || end < first {
			first = end
		}
		switch {
		case tm.unsent:
			unsent++
		case state == 0 || tm.state != state:
			count++
		}
	})
	if count < limit && unsent < unsentFactor*limit {
		return nil
	}
	return &LimitError{RetryAfter: max(first-now, 0)}
}

// Activate makes the timer run. It is called when the roomserver has answered, whatever the answer was: an event that is
// not in its room is found out when the timer fires, and one whose fate is unknown must not lose its timer.
func (p *Pending) Activate(sent bool) {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	tm := p.t.index.at(p.timer)
	if tm == nil || tm.gone { // the stream can be faster than the roomserver's answer
		return
	}
	tm.confirmed, tm.unsent = sent, !sent
	if !sent && !p.existed {
		p.t.index.addToRequests(p.timer.slot, tm)
	}
	p.t.activate(p.timer, tm)
}

// activate makes the scheduler look at a timer that was pending. If somebody has found it meanwhile and could not tell yet whether its
// event is replaced, that is looked at first. Timers.mu is held.
func (t *Timers) activate(r ref, tm *timer) {
	wake := tm.due
	if tm.doubtful {
		wake = min(wake, t.clock.now()+lookAgainAfter)
	}
	tm.pending = false
	t.index.schedule(r, wake)
	t.notify()
}

// LockRequest waits until no other request with this hash is being dealt with, and returns the function that lets the next
// one in. What a client repeats because it was impatient must find what came of it the first time.
func (t *Timers) LockRequest(ctx context.Context, request RequestHash) (unlock func(), err error) {
	return t.requests.Lock(ctx, request)
}

// Sent returns the ID of the event that was accepted from a request which is repeated now, by an earlier process, or by this
// one if the roomserver failed to take it; or "" if there is none. The event is in its room then, even if it was not before.
func (t *Timers) Sent(ctx context.Context, request RequestHash) (string, error) {
	number := t.tokens.names.request(request)
	t.mu.Lock()
	r, eventID := t.index.ofRequest(number)
	t.mu.Unlock()
	if eventID != "" || r == (ref{}) {
		return eventID, nil
	}
	row, _, err := t.load(ctx, r)
	if err == nil {
		err = t.confirm(ctx, r, row.Event)
	}
	if errors.Is(err, ErrUnknownEvent) {
		err = t.sendAgain(ctx, r, row.Event)
	}
	switch {
	case err == nil:
		return row.Event.ID, nil
	case isFinal(err):
		return "", nil
	}
	return "", fmt.Errorf("sending an event again: %w", err)
}

// sendAgain gives an event to the roomserver that it does not have, or has in its queue.
func (t *Timers) sendAgain(ctx context.Context, r ref, e Event) error {
	if err := t.roomserver.Resubmit(ctx, Timer{Event: e}, e.Request.Signed); err != nil {
		return err
	}
	t.confirmed(r)
	return nil
}

// find returns the timer of a token, or of a delay ID.
func (t *Timers) find(h TokenHash, delayed bool) ref {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.token(h, delayed)
}

// ofEvent returns the timer of an event, running or not: the event's token says which.
func (t *Timers) ofEvent(eventID string) ref {
	return t.find(HashToken(t.tokens.Token(eventID)), false)
}

// Running reports whether there is a running timer for an event of this sender.
func (t *Timers) Running(eventID, sender string) bool {
	r, number := t.ofEvent(eventID), t.tokens.names.hash(sender)
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	return tm.running() && tm.sender == number
}

// Allow reports whether a token was issued by this server and has not been forgotten, although it may still be refused; and if so,
// whether there may be a request with it now (contract, section 2): if there were too many, wait is after how long, and else 0.
func (t *Timers) Allow(h TokenHash) (known bool, wait time.Duration) { return t.allow(h, false) }

func (t *Timers) allow(h TokenHash, delayed bool) (known bool, wait time.Duration) {
	now := t.clock.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(t.index.token(h, delayed))
	if tm == nil {
		return false, 0
	}
	return true, tm.asked.Take(t.cfg.TokenLimit, now)
}

// Refresh restarts the timer of a token with its stored duration. When it returns nil, the new deadline is durable. The
// error is ErrNotFound if no such timer runs; after any other error the timer stands as it was, or as refreshed.
func (t *Timers) Refresh(ctx context.Context, h TokenHash) error {
	r := t.find(h, false)
	if r == (ref{}) {
		return ErrNotFound
	}
	return t.refresh(ctx, r, 0)
}

// Restart gives the running timer of an event a new duration, counted from now (contract, section 1: a state event sent
// again with identical content). The caller holds the lock of the event's state key.
func (t *Timers) Restart(ctx context.Context, eventID string, duration time.Duration) error {
	r := t.ofEvent(eventID)
	if r == (ref{}) {
		return ErrNotFound
	}
	row, _, err := t.load(ctx, r)
	if err == nil {
		// It is the current state, and yet clients may not have seen it: a crash can leave it so.
		err = t.confirm(ctx, r, row.Event)
	}
	if err != nil {
		return fmt.Errorf("sending %s again: %w", eventID, err)
	}
	return t.refresh(ctx, r, duration)
}

// lockRow takes the lock under which a timer's row is written, so that what memory says of the row is what was written
// last, and returns the function that gives it back. Meanwhile a timer that was found stays in its place, gone or not: it is
// given to another only when the row is deleted. A caller whose context ends while another has the lock gives up: the error is
// batch.ErrNotAsked then. Whoever has it waits for nothing but the database.
func (t *Timers) lockRow(ctx context.Context, r ref) (unlock func(), err error) {
	if unlock, err = t.rows.Lock(ctx, r.nid); err != nil {
		return nil, fmt.Errorf("%w: %w", batch.ErrNotAsked, err)
	}
	return unlock, nil
}

// refresh sets a new deadline, and a new duration if it is not 0.
func (t *Timers) refresh(ctx context.Context, r ref, duration time.Duration) error {
	if t.isDoubtful(r) {
		if err := t.dropReplaced(ctx, []ref{r}); err != nil {
			return err
		}
	}
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	t.mu.Lock()
	tm := t.index.at(r)
	running := tm.running()
	if running && duration == 0 {
		duration = tm.duration
	}
	t.mu.Unlock()
	if !running {
		return ErrNotFound
	}
	due := t.clock.now() + duration
	deadline := t.clock.stored(due)
	failpoint.Pass(failpoint.BeforeRefresh)
	ok, err := t.refreshes.Do(ctx, Refresh{NID: r.nid, Duration: duration, Deadline: deadline})
	if err != nil {
		if !errors.Is(err, batch.ErrNotAsked) {
			t.metrics.errors.WithLabelValues("refresh").Inc()
		}
		return fmt.Errorf("storing a new deadline: %w", err)
	}
	if !ok {
		if _, _, err = t.loadLocked(ctx, r); err != nil {
			return err
		}
		return ErrNotFound
	}
	failpoint.Pass(failpoint.AfterRefresh)
	t.mu.Lock()
	tm.duration, tm.due, tm.deadline = duration, due, deadline.UnixMilli()
	tm.unsure, tm.failures, tm.unsent = false, 0, false
	nearer := tm.place >= 0 && due < tm.wake
	if nearer {
		t.index.schedule(r, due)
	}
	t.mu.Unlock()
	if nearer {
		t.notify()
	}
	return nil
}

// End closes the event of a token now. When it returns nil, the closing event is in the room. The error is ErrNotFound
// if no such timer runs, a *DropError if the sender may not send the closing event, and else a passing fault: the timer
// goes on, and End may be called again.
func (t *Timers) End(ctx context.Context, h TokenHash) error {
	r := t.find(h, false)
	switch {
	case r == ref{}:
		return ErrNotFound
	case t.refusedOnce(r):
		return &DropError{Reason: SenderGone}
	}
	err := t.endNow(ctx, r)
	var dropped *DropError
	switch {
	case err == nil:
		return nil
	case t.refusedOnce(r): // the stream was faster
		return &DropError{Reason: SenderGone}
	case errors.As(err, &dropped):
		if dropped.isRefusal() {
			return err
		}
		return ErrNotFound
	case errors.Is(err, ErrNotFound):
		return ErrNotFound
	}
	return fmt.Errorf("ending an expiring event: %w", err)
}

// refusedOnce reports whether a timer was dropped because its sender is gone and nobody was told, and forgets its token.
func (t *Timers) refusedOnce(r ref) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	if tm == nil || !tm.refused {
		return false
	}
	t.index.forgetToken(r)
	return true
}

// StateComes is called before a state event of this server is given to the roomserver. It writes down which timers it may replace: whether
// it did is found out behind the sender's answer, see StateSent, and if the process dies before, the next one has to find out before a
// token is used. If it fails, all is well as long as the process lives. It does not fail because the caller hangs up.
func (t *Timers) StateComes(ctx context.Context, s StateKey, eventID string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	for _, r := range t.ofState(s, eventID) {
		if t.isDelayed(r) {
			continue
		}
		if err := t.doubt(ctx, r); err != nil {
			t.metrics.errors.WithLabelValues("doubt").Inc()
			return fmt.Errorf("noting that an event may be replaced: %w", err)
		}
		failpoint.Pass(failpoint.AfterDoubt)
	}
	return nil
}

// doubt writes down that the event of a timer may be replaced. Under the row's lock: the row may be on its way.
func (t *Timers) doubt(ctx context.Context, r ref) error {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = t.doubts.Do(ctx, r.nid)
	return err
}

// StateSent is called when a state event that was sent here has come to the roomserver. It stops the delayed events that are overtaken,
// and sees to it that no token of an expiring event that was replaced is worth anything any more: whoever uses one looks first. The
// timer itself goes when the output stream tells of the change. To find out what the current state is, the roomserver goes through all
// state of the room, and the sender need not wait for that. If it fails, StateChanged must be called.
func (t *Timers) StateSent(ctx context.Context, s StateKey, eventID string) error {
	var delayed []ref
	for _, r := range t.ofState(s, eventID) {
		if t.isDelayed(r) {
			delayed = append(delayed, r)
		} else {
			t.supersede(r)
		}
	}
	return t.dropReplaced(ctx, delayed)
}

// StateChanged stops the timers of a piece of state whose event was replaced. It is called when the output stream tells of a state
// event. If it fails, a timer may run on that must not: call it again.
func (t *Timers) StateChanged(ctx context.Context, s StateKey, eventID string) error {
	return t.dropReplaced(ctx, t.ofState(s, eventID))
}

// ofState returns the running timers of a piece of state, but for that of the event that is its current state now.
func (t *Timers) ofState(s StateKey, eventID string) (timers []ref) {
	state, itself := t.tokens.names.state(s), t.tokens.names.hash(eventID)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.ofState(state, func(r ref, tm *timer) {
		if tm.running() && tm.event != itself {
			timers = append(timers, r)
		}
	})
	return timers
}

// StateRemoved does what StateChanged does for the timer of an event that is found to be no longer the current state.
func (t *Timers) StateRemoved(ctx context.Context, eventID string) error {
	r := t.ofEvent(eventID)
	if r == (ref{}) {
		return nil
	}
	return t.dropReplaced(ctx, []ref{r})
}

// RoomChanged does what StateChanged does for all state of a room. It is called when the whole state was rewritten.
func (t *Timers) RoomChanged(ctx context.Context, roomID string) error {
	room := t.tokens.names.hash(roomID)
	t.mu.Lock()
	timers := slices.DeleteFunc(t.index.inRoom(room), func(r ref) bool { return t.index.at(r).state == 0 })
	t.mu.Unlock()
	return t.dropReplaced(ctx, timers)
}

// dropReplaced stops those timers of state events that were replaced. At those that are left somebody looks again: the output
// stream can be faster than the roomserver's database. One that is claimed is left to whoever closes it: to ask about each
// event that its own closing event replaces would go through all state of the room.
func (t *Timers) dropReplaced(ctx context.Context, timers []ref) error {
	var failed []error
	for _, r := range timers {
		if !t.isRunning(r) {
			continue
		}
		row, _, err := t.load(ctx, r)
		replaced := false
		if err == nil {
			replaced, err = t.roomserver.Replaced(ctx, row)
		}
		switch {
		case replaced:
			t.log.WithFields(logrus.Fields{"timer_nid": r.nid, "event_id": row.Event.ID}).Debug("An event was replaced")
			t.drop(ctx, r, Replaced)
		case err != nil && !isFinal(err):
			t.metrics.errors.WithLabelValues("current_state").Inc()
			failed = append(failed, fmt.Errorf("looking up whether an event was replaced: %w", err))
		}
		t.lookAgain(r)
	}
	return errors.Join(failed...)
}

// supersede makes somebody find out whether an event was replaced by state that was sent here. Until then the timer does not count for
// the limit.
func (t *Timers) supersede(r ref) {
	t.mu.Lock()
	if tm := t.index.at(r); tm.running() {
		tm.superseded = true
	}
	t.mu.Unlock()
	t.lookAgain(r)
}

// lookAgain makes the scheduler find out once more whether an event was replaced. Until then a refresh does.
func (t *Timers) lookAgain(r ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	if !tm.running() {
		return
	}
	tm.doubtful = true
	if tm.pending { // see activate
		return
	}
	if wake := t.clock.now() + lookAgainAfter; tm.place < 0 || wake < tm.wake {
		t.index.schedule(r, wake)
		t.notify()
	}
}

// dropDoubtful stops a timer that lookAgain has been told of, if its event was replaced.
func (t *Timers) dropDoubtful(ctx context.Context, r ref, row Timer) error {
	replaced, err := t.roomserver.Replaced(ctx, row)
	switch {
	case err != nil:
		return fmt.Errorf("looking up whether an event was replaced: %w", err)
	case replaced:
		t.drop(ctx, r, Replaced)
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm := t.index.at(r); tm != nil {
		tm.doubtful, tm.superseded = false, false
	}
	return nil
}

func (t *Timers) isRunning(r ref) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.at(r).running()
}

func (t *Timers) isDoubtful(r ref) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	return tm.running() && tm.doubtful
}

// DropEvent stops the timer of an event, if it has one that runs. No closing event will be sent.
func (t *Timers) DropEvent(ctx context.Context, eventID string, reason DropReason) {
	r := t.ofEvent(eventID)
	if r == (ref{}) {
		return
	}
	if reason == Redacted { // who repeats its request is told of it, and does not send it anew
		t.mu.Lock()
		t.index.answer(r, eventID)
		t.mu.Unlock()
	}
	t.drop(ctx, r, reason)
}

// DropSender stops the timers of a user in a room whose events were accepted before the given time.
func (t *Timers) DropSender(ctx context.Context, roomID, userID string, before time.Time) {
	var timers []ref
	room, sender := t.tokens.names.hash(roomID), t.tokens.names.hash(userID)
	t.mu.Lock()
	t.index.ofSender(sender, func(r ref, tm *timer) {
		if !tm.delayed && tm.room == room && time.UnixMilli(tm.received).Before(before) {
			timers = append(timers, r)
		}
	})
	t.mu.Unlock()
	for _, r := range timers {
		t.drop(ctx, r, SenderGone)
	}
}

// DropRoom stops all timers of a room.
func (t *Timers) DropRoom(ctx context.Context, roomID string) {
	for _, r := range t.timersIn(roomID) {
		t.drop(ctx, r, RoomGone)
	}
}

// drop stops a running timer. One that is claimed is left to whoever closes it.
func (t *Timers) drop(ctx context.Context, r ref, reason DropReason) {
	if t.isDelayed(r) {
		t.dropDelayed(ctx, r, reason)
		return
	}
	unlock, err := t.lockRow(ctx, r)
	if err != nil { // whoever asked for it asks again, or it is found out when the timer is due; see Settle
		t.log.WithError(err).WithFields(logrus.Fields{"timer_nid": r.nid, "reason": reason}).Warn("Failed to drop a timer")
		return
	}
	t.mu.Lock()
	tm := t.index.at(r)
	running := tm.running()
	if running {
		t.index.remove(r)
		if now := t.clock.now(); reason == SenderGone && tm.due > now {
			t.index.refuse(r, min(tm.due, now+refusedFor))
		}
	}
	t.mu.Unlock()
	unlock()
	if !running {
		return
	}
	t.metrics.drops.WithLabelValues(string(reason)).Inc()
	t.log.WithFields(logrus.Fields{"timer_nid": r.nid, "reason": reason}).Debug("Dropped the timer of an expiring event")
	failpoint.Pass(failpoint.BeforeDrop)
	t.removeRow(ctx, r)
}

// removeRow deletes the row of a timer that is gone, unless somebody has done so. If that fails, the scheduler tries again
// later. A claim that failed goes too, written or not: its event was given to nobody.
func (t *Timers) removeRow(ctx context.Context, r ref) {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		t.mu.Lock()
		left := t.isLeft(r)
		t.mu.Unlock()
		if left {
			t.scheduleRetry(r)
		}
		return
	}
	defer unlock()
	t.removeRowLocked(ctx, r)
}

// isLeft reports whether a timer is gone and its row is not yet deleted. Timers.mu is held.
func (t *Timers) isLeft(r ref) bool {
	tm := t.index.at(r)
	return tm != nil && tm.left
}

// removeRowLocked is removeRow under the row's lock.
func (t *Timers) removeRowLocked(ctx context.Context, r ref) {
	t.mu.Lock()
	tm := t.index.at(r)
	left := tm != nil && tm.left
	remove := t.drops
	if left && (tm.claimed || tm.unsure) {
		remove = t.deletes
	}
	t.mu.Unlock()
	if !left {
		return
	}
	_, err := remove.Do(ctx, r.nid)
	t.removed(err, r)
}

// removeRowBehind is removeRow for whoever has other things to do: the row of a closed event is deleted later, with those of
// others. Nobody writes to it any more.
func (t *Timers) removeRowBehind(r ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	switch {
	case tm == nil || !tm.left:
	case !tm.claimed:
		t.watcher.Go(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), batch.Timeout) // also when the component stops
			defer cancel()
			if !guard.Run("deleting a row", func() { t.removeRow(ctx, r) }) {
				t.scheduleRetry(r)
			}
		})
	default:
		if t.swept = append(t.swept, r); len(t.swept) == 1 {
			t.watcher.Go(func() { guard.Run("deleting rows", t.sweep) })
		}
	}
}

// sweep deletes the rows of closed events, when they have gathered for a while, or the component stops.
func (t *Timers) sweep() {
	select {
	case <-time.After(sweepPause):
	case <-t.ctx.Done():
	}
	t.mu.Lock()
	swept := t.swept
	t.swept = nil
	t.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), batch.Timeout)
	defer cancel()
	for some := range slices.Chunk(swept, batch.Max) {
		nids := make([]int64, len(some))
		for i, r := range some {
			nids[i] = r.nid
		}
		err := batch.ErrUndecided
		guard.Run("deleting rows", func() { err = t.store.Delete(ctx, nids) })
		t.removed(err, some...)
	}
}

// removed does what follows from an attempt to delete rows.
func (t *Timers) removed(err error, timers ...ref) {
	failpoint.Pass(failpoint.AfterDelete)
	if err == nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, r := range timers {
			t.index.forgetRow(r)
		}
		return
	}
	for _, r := range timers {
		t.metrics.errors.WithLabelValues("delete").Inc()
		t.log.WithError(err).WithField("timer_nid", r.nid).Error("Failed to delete the timer of an expiring event")
		t.scheduleRetry(r)
	}
}

// Settle deletes the rows of timers that were stopped and could not be deleted then. Until it has returned nil, a crash
// could bring back a timer that was stopped before.
func (t *Timers) Settle(ctx context.Context) error {
	for _, r := range t.stopped() {
		t.removeRow(ctx, r)
	}
	if err := ctx.Err(); err != nil {
		return err // a timer that should have been dropped may still run
	}
	if n := len(t.stopped()); n > 0 {
		return fmt.Errorf("%d stopped timers still have their rows", n)
	}
	return nil
}

// stopped returns the timers that were stopped and still have their rows. Those of closed events are not among them: they are
// deleted by whoever closed them, and what a crash could bring back is the closing event that the room has.
func (t *Timers) stopped() (timers []ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for r := range t.index.left {
		if !t.index.at(r).claimed {
			timers = append(timers, r)
		}
	}
	return timers
}

// scheduleRetry makes the scheduler look at the timer again after a pause that grows with each failure. It returns how
// many there were.
func (t *Timers) scheduleRetry(r ref) (failures int) {
	t.mu.Lock()
	if tm := t.index.at(r); tm != nil {
		failures = min(int(tm.failures)+1, maxFailures)
		tm.failures = uint8(failures)
		wake := t.clock.now() + min(firstPause<<(failures-1), lastPause)
		if tm.place >= 0 { // whoever asks often does not put off what is planned
			wake = min(wake, tm.wake)
		}
		t.index.schedule(r, wake)
	}
	t.mu.Unlock()
	t.notify()
	return failures
}

// load reads the row of a timer, and makes memory say what it says. It returns the moment of the deadline too, and
// ErrNotFound if the timer is gone.
func (t *Timers) load(ctx context.Context, r ref) (row Timer, due time.Duration, err error) {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		return row, 0, err
	}
	defer unlock()
	return t.loadLocked(ctx, r)
}

// loadLocked is load under the row's lock.
func (t *Timers) loadLocked(ctx context.Context, r ref) (row Timer, due time.Duration, err error) {
	t.mu.Lock()
	tm := t.index.at(r)
	if tm == nil || tm.gone {
		t.mu.Unlock()
		return row, 0, ErrNotFound
	}
	t.mu.Unlock()
	found, err := t.reads.Do(ctx, r.nid)
	if err != nil {
		return row, 0, fmt.Errorf("reading a timer: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm = t.index.at(r); tm == nil || tm.gone {
		return row, 0, ErrNotFound
	}
	if found == nil {
		if tm.delayed && tm.claimed { // and finalised, though that failed
			t.senders[tm.sender] = struct{}{}
			t.forgetClaimed(r)
		}
		t.index.remove(r)
		t.index.forgetRow(r)
		return row, 0, ErrNotFound
	}
	row = *found
	tm.unsure, tm.claimed, tm.duration = false, row.Claim != nil, row.Duration
	if deadline := row.Deadline.UnixMilli(); deadline != tm.deadline {
		tm.deadline, tm.due = deadline, t.clock.moment(row.Deadline)
	}
	return row, tm.due, nil
}

// confirmed notes that an event is in its room.
func (t *Timers) confirmed(r ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm := t.index.at(r); tm != nil {
		tm.confirmed, tm.unsent, tm.awaited = true, false, 0
	}
}

// unfinished returns the timers of a piece of state that are claimed and not closed, but for those that the roomserver does not answer.
func (t *Timers) unfinished(state uint64) (timers []ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.ofState(state, func(r ref, tm *timer) {
		if tm.claimed && tm.unanswered == 0 {
			timers = append(timers, r)
		}
	})
	return timers
}

func (t *Timers) timersIn(roomID string) []ref {
	room := t.tokens.names.hash(roomID)
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.inRoom(room)
}

// notify tells the scheduler that the first wake may have come nearer.
func (t *Timers) notify() {
	select {
	case t.wakeup <- struct{}{}:
	default:
	}
}
