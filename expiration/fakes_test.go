package expiration

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

var errFault = errors.New("a passing fault")

// memoryStore is a Store that lasts as long as the test. The suite in storagetest tests the real ones.
type memoryStore struct {
	mu        sync.Mutex
	rows      map[int64]Timer
	digests   map[int64]Digest
	finalised []DelayedEvent
	// fail is called before each operation, and its error is the operation's. If after is set, the operation is done nevertheless.
	fail  func(operation string) error
	after bool
	// deleteTakes is how long deletions take. insertTakes is how long insertions take, before or after the row is written.
	deleteTakes, insertTakes time.Duration
	insertAfter              bool
	// held is not nil while operations wait for it to be closed, regardless of their contexts. waiting is the number of those operations.
	held    chan struct{}
	waiting int
	prunes  int
}

// setInsertTakes makes insertions slow, before or after the row is written.
func (s *memoryStore) setInsertTakes(d time.Duration, after bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.insertTakes, s.insertAfter = d, after
}

// setSlowly makes insertions as slow as an action of the model says. The time is no whole number of milliseconds, and differs from all
// other times in the model. So no two things happen at the same moment, in an order that would be random.
func (s *memoryStore) setSlowly(broken map[string]action) {
	a, slow := broken["slow insert"]
	if !slow {
		s.setInsertTakes(0, false)
		return
	}
	s.setInsertTakes(a.long.Truncate(time.Millisecond)+71*time.Microsecond, a.written)
}

// hold makes the store hang, and returns the function that ends that.
func (s *memoryStore) hold() (release func()) {
	held := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = held
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held = nil
		close(held)
	}
}

// hanging returns the number of operations that hang.
func (s *memoryStore) hanging() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// pruned returns how many times the store was pruned.
func (s *memoryStore) pruned() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.prunes
}

// row returns the row of a timer, or nil.
func (s *memoryStore) row(nid int64) *Timer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if row, ok := s.rows[nid]; ok {
		return &row
	}
	return nil
}

// wait is called before each operation.
func (s *memoryStore) wait() {
	s.mu.Lock()
	held := s.held
	if held != nil {
		s.waiting++
	}
	s.mu.Unlock()
	if held != nil {
		<-held
		s.mu.Lock()
		s.waiting--
		s.mu.Unlock()
	}
}

// set changes the fields above while the engine runs.
func (s *memoryStore) set(after bool, fail func(operation string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.after, s.fail = after, fail
}

func (s *memoryStore) setDeleteTakes(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deleteTakes = d
}

func newMemoryStore() *memoryStore {
	return &memoryStore{rows: map[int64]Timer{}, digests: map[int64]Digest{}}
}

func (s *memoryStore) do(operation string, f func()) error {
	s.wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.fail != nil {
		err = s.fail(operation)
	}
	if err == nil || s.after {
		f()
	}
	return err
}

func (s *memoryStore) Insert(_ context.Context, t Timer, d Digest) error {
	s.mu.Lock()
	takes, after := s.insertTakes, s.insertAfter
	s.mu.Unlock()
	if !after {
		time.Sleep(takes)
	}
	err := s.do("insert", func() { s.rows[t.NID], s.digests[t.NID] = t, d })
	if after {
		time.Sleep(takes)
	}
	return err
}

func (s *memoryStore) Refresh(_ context.Context, refreshes []Refresh) ([]bool, error) {
	found := make([]bool, len(refreshes))
	err := s.do("refresh", func() {
		for i, r := range refreshes {
			row, ok := s.rows[r.NID]
			if found[i] = ok && row.Claim == nil; found[i] {
				row.Duration, row.Deadline = r.Duration, r.Deadline
				s.rows[r.NID] = row
			}
		}
	})
	return found, err
}

func (s *memoryStore) Claim(_ context.Context, claims []ConditionalClaim) ([]bool, error) {
	found := make([]bool, len(claims))
	err := s.do("claim", func() {
		for i, c := range claims {
			row, ok := s.rows[c.NID]
			if found[i] = ok && row.Claim == nil && row.Deadline.Equal(c.Deadline); found[i] {
				row.Claim = &c.Claim
				s.rows[c.NID] = row
			}
		}
	})
	return found, err
}

func (s *memoryStore) Doubt(_ context.Context, nids []int64) error {
	return s.do("doubt", func() {
		for _, nid := range nids {
			delete(s.digests, nid)
		}
	})
}

func (s *memoryStore) Drop(_ context.Context, nids []int64) error {
	return s.do("drop", func() {
		for _, nid := range nids {
			if s.rows[nid].Claim == nil {
				delete(s.rows, nid)
			}
		}
	})
}

func (s *memoryStore) Delete(_ context.Context, nids []int64) error {
	s.mu.Lock()
	takes := s.deleteTakes
	s.mu.Unlock()
	time.Sleep(takes)
	return s.do("delete", func() {
		for _, nid := range nids {
			delete(s.rows, nid)
		}
	})
}

func (s *memoryStore) Finalise(_ context.Context, nid int64, f Final, running bool, keep int) (done bool, err error) {
	err = s.do("finalise", func() {
		row, ok := s.rows[nid]
		if done = ok && row.Delayed != nil && (row.Claim == nil || !running); !done {
			return
		}
		delete(s.rows, nid)
		s.finalised = append(s.finalised, DelayedEvent{Timer: row, Final: &f})
		extra := -keep
		for _, d := range s.finalised {
			if d.Timer.Event.Sender == row.Event.Sender {
				extra++
			}
		}
		s.finalised = slices.DeleteFunc(s.finalised, func(d DelayedEvent) bool {
			extra--
			return extra >= 0 && d.Timer.Event.Sender == row.Event.Sender
		})
	})
	return done && err == nil, err
}

// lookup returns the first finalised event that matches, or ErrNotFound.
func (s *memoryStore) lookup(has func(DelayedEvent) bool) (d DelayedEvent, err error) {
	err = s.do("finalised", func() {
		if i := slices.IndexFunc(s.finalised, has); i >= 0 {
			d = s.finalised[i]
		}
	})
	if err == nil && d.Final == nil {
		err = ErrNotFound
	}
	return d, err
}

func (s *memoryStore) Finalised(_ context.Context, h TokenHash) (DelayedEvent, error) {
	return s.lookup(func(d DelayedEvent) bool { return d.Timer.TokenHash == h })
}

func (s *memoryStore) FinalisedAs(_ context.Context, sender string, eventIDs []string) (map[string]string, error) {
	rowIDs := map[string]string{}
	err := s.do("finalised as", func() {
		for _, d := range s.finalised {
			if d.Timer.Event.Sender == sender && slices.Contains(eventIDs, d.Final.EventID) {
				rowIDs[d.Final.EventID] = d.Timer.Event.ID
			}
		}
	})
	return rowIDs, err
}

func (s *memoryStore) FinalisedSenders(context.Context) (senders []string, err error) {
	err = s.do("senders", func() {
		for _, d := range s.finalised {
			if d.Final.Sent() {
				senders = append(senders, d.Timer.Event.Sender)
			}
		}
	})
	return senders, err
}

func (s *memoryStore) Requested(_ context.Context, h RequestHash) (rowID string, err error) {
	has := func(e Event) bool { return e.Request != nil && e.Request.Hash == h }
	err = s.do("requested", func() {
		for _, row := range s.rows {
			if row.Delayed != nil && has(row.Event) {
				rowID = row.Event.ID
			}
		}
		for _, d := range s.finalised {
			if has(d.Timer.Event) {
				rowID = d.Timer.Event.ID
			}
		}
	})
	if err == nil && rowID == "" {
		err = ErrNotFound
	}
	return rowID, err
}

func (s *memoryStore) Prune(_ context.Context, before time.Time) error {
	return s.do("prune", func() {
		s.prunes++
		s.finalised = slices.DeleteFunc(s.finalised, func(d DelayedEvent) bool { return d.Final.At.Before(before) })
	})
}

func (s *memoryStore) Read(_ context.Context, nids []int64) ([]*Timer, error) {
	rows := make([]*Timer, len(nids))
	err := s.do("read", func() {
		for i, nid := range nids {
			if row, ok := s.rows[nid]; ok {
				rows[i] = &row
			}
		}
	})
	return rows, err
}

func (s *memoryStore) Index(_ context.Context, f func(Indexed) error) error {
	var rows []Indexed
	if err := s.do("index", func() {
		for nid, row := range s.rows {
			rows = append(rows, Indexed{
				NID: nid, Digest: s.digests[nid], Claimed: row.Claim != nil, Duration: row.Duration, Deadline: row.Deadline,
			})
		}
	}); err != nil {
		return err
	}
	for _, row := range rows {
		if err := f(row); err != nil {
			return err
		}
	}
	return nil
}

func (s *memoryStore) Ping(context.Context) error { return s.do("ping", func() {}) }

func (s *memoryStore) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.rows)
}

// has reports whether an event has a row, and whether the next start will doubt it.
func (s *memoryStore) has(eventID string) (exists, doubted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for nid, row := range s.rows {
		if row.Event.ID == eventID {
			_, sure := s.digests[nid]
			return true, !sure
		}
	}
	return false, false
}

// fakeRoomserver is a Roomserver whose state changes by the test and by closing events.
type fakeRoomserver struct {
	mu     sync.Mutex
	state  map[StateKey]string   // the IDs of the current events
	events map[string]int        // the number of each known event, in the order in which they became known
	stored map[string]stored     // the events that a crash has left stored and not sent
	never  map[string]DropReason // the reason why an event gets no closing event, by event ID
	last   map[string][]string   // the forward extremities, by room
	log    []closing             // the closing events, in the order in which the rooms got them
	// delayed has the delayed events in the order in which the rooms got them. senders has the senders of events.
	delayed []sentEvent
	senders map[string]string
	begun   map[string]time.Time // when building a closing event began, by its ID
	built   int
	silent  map[string]bool // the rooms in which no event is answered

	hooks hooks
}

// hooks are called without a lock. An error ends the attempt to close an event, to look up the current state, or to wake the roomserver for
// the event's room.
type hooks struct {
	beforeClaim, afterClaim, look, looked, wake func(Event) error
}

// set changes the hooks while the engine runs.
func (r *fakeRoomserver) set(h hooks) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hooks = h
}

func (r *fakeRoomserver) call(which func(hooks) func(Event) error, e Event) error {
	r.mu.Lock()
	f := which(r.hooks)
	r.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(e)
}

// attempts returns the number of closing events that were built.
func (r *fakeRoomserver) attempts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.built
}

// takes returns a hook that takes time.
func takes(d time.Duration) func(Event) error {
	return func(Event) error { time.Sleep(d); return nil }
}

// fails is a hook that fails in passing.
func fails(Event) error { return errFault }

// closing is a closing event that a room has got.
type closing struct {
	eventID, closes, roomID string
	outcome                 Outcome
	over                    string // the previous current state, if it is state
	built                   time.Time
	at                      time.Time
	sent                    time.Time // as the closing event says
}

// fakePDU is a signed event of the fake.
type fakePDU struct {
	Outcome    Outcome   `json:"outcome,omitempty"`
	Sent       time.Time `json:"sent,omitzero"`
	Content    string    `json:"content,omitempty"`
	Over       string    `json:"over,omitempty"` // the current state when it was built
	PrevEvents []string  `json:"prev_events"`
}

// write builds an event whose prev events are the room's forward extremities. The caller holds fakeRoomserver.mu.
func (r *fakeRoomserver) write(roomID string, p fakePDU) []byte {
	p.PrevEvents = slices.Clone(r.last[roomID])
	pdu, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return pdu
}

// read decodes an event that write built, and updates the forward extremities. The caller holds fakeRoomserver.mu.
func (r *fakeRoomserver) read(roomID string, e SignedEvent) (p fakePDU) {
	if err := json.Unmarshal(e.PDU, &p); err != nil {
		panic(err)
	}
	r.last[roomID] = append(slices.DeleteFunc(r.last[roomID], func(id string) bool { return slices.Contains(p.PrevEvents, id) }), e.EventID)
	return p
}

// stored is an event that is stored and not sent, and the state that was current when it was built.
type stored struct {
	event Event
	over  string
}

// sentEvent is a delayed event that a room has got.
type sentEvent struct {
	eventID, content string
	at               time.Time
}

func newFakeRoomserver() *fakeRoomserver {
	return &fakeRoomserver{
		senders: map[string]string{},
		state:   map[StateKey]string{}, events: map[string]int{}, stored: map[string]stored{},
		never: map[string]DropReason{}, begun: map[string]time.Time{}, last: map[string][]string{}, silent: map[string]bool{},
	}
}

// refuse makes the roomserver accept no closing event for an event.
func (r *fakeRoomserver) refuse(eventID string, reason DropReason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.never[eventID] = reason
}

// store makes an event known in the state in which a crash leaves one half done.
func (r *fakeRoomserver) store(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.know(e.ID)
	s, _ := e.State()
	r.stored[e.ID] = stored{e, r.state[s]}
}

func (r *fakeRoomserver) Confirm(_ context.Context, e Event) error {
	r.mu.Lock()
	half, stored := r.stored[e.ID]
	known := r.events[e.ID] > 0
	delete(r.stored, e.ID)
	s, _ := e.State()
	newer := r.state[s] != half.over
	r.mu.Unlock()
	switch {
	case !known:
		return ErrUnknownEvent
	case stored && !newer:
		r.send(e)
	}
	return nil
}

// send makes an event known, and current if it is state.
func (r *fakeRoomserver) send(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[e.RoomID] = []string{e.ID}
	r.put(e)
}

// put is send without a change of the forward extremities. The caller holds fakeRoomserver.mu.
func (r *fakeRoomserver) put(e Event) {
	r.know(e.ID)
	r.senders[e.ID] = e.Sender
	if s, ok := e.State(); ok {
		r.state[s] = e.ID
	}
}

func (r *fakeRoomserver) Close(
	ctx context.Context, e Event, o Outcome, sent time.Time, lost bool, claim func(context.Context, SignedEvent) error,
) error {
	begun := time.Now()
	if err := r.call(func(h hooks) func(Event) error { return h.beforeClaim }, e); err != nil {
		return err
	}
	r.mu.Lock()
	s, isState := e.State()
	never := r.never[e.ID]
	known, current := r.events[e.ID] > 0, !isState || r.state[s] == e.ID
	setBack := !current && !r.newer(r.state[s], e.ID)
	r.built++
	pdu := r.write(e.RoomID, fakePDU{Outcome: o, Sent: sent, Over: r.state[s]})
	c := SignedEvent{EventID: fmt.Sprintf("$closing%d", r.built), RoomVersion: "10", PDU: pdu}
	r.begun[c.EventID] = begun
	r.mu.Unlock()
	switch {
	case never != "":
		return &DropError{Reason: never}
	case !known:
		return ErrUnknownEvent
	case setBack && !lost:
		return ErrSetBack
	case !current && !setBack:
		return &DropError{Reason: Replaced}
	}
	if err := claim(ctx, c); err != nil {
		return err
	}
	return r.input(ctx, e, c)
}

// silence makes a room's worker stop answering, or answer again.
func (r *fakeRoomserver) silence(roomID string, silent bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.silent[roomID] = silent
}

// answers waits for the room's worker. It returns an error if the worker does not answer before ctx is done.
func (r *fakeRoomserver) answers(ctx context.Context, roomID string) error {
	r.mu.Lock()
	silent := r.silent[roomID]
	r.mu.Unlock()
	if !silent {
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}

func (r *fakeRoomserver) Wake(_ context.Context, roomID string) error {
	return r.call(func(h hooks) func(Event) error { return h.wake }, Event{RoomID: roomID})
}

func (r *fakeRoomserver) input(ctx context.Context, e Event, c SignedEvent) error {
	if err := r.answers(ctx, e.RoomID); err != nil {
		return err
	}
	if err := r.call(func(h hooks) func(Event) error { return h.afterClaim }, e); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.events[c.EventID] > 0 {
		return nil
	}
	r.know(c.EventID)
	p := r.read(e.RoomID, c)
	s, isState := e.State()
	over := r.state[s]
	if r.newer(over, p.Over) { // the two cross, and state resolution prefers the later one
		over, isState = p.Over, false
	}
	r.log = append(r.log, closing{
		eventID: c.EventID, closes: e.ID, roomID: e.RoomID, outcome: p.Outcome, over: over,
		built: r.begun[c.EventID], at: time.Now(), sent: p.Sent,
	})
	if isState {
		r.state[s] = c.EventID
	}
	return nil
}

// has reports whether an event is in its room; a stored event is not.
func (r *fakeRoomserver) has(eventID string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, stored := r.stored[eventID]
	return r.events[eventID] > 0 && !stored
}

func (r *fakeRoomserver) Resubmit(ctx context.Context, t Timer, c SignedEvent) error {
	e := t.Event
	switch {
	case t.Delayed != nil && c.PDU == nil:
		return errors.New("there is no event to be sent again")
	case t.Delayed != nil:
		return r.inputDelayed(ctx, e, c)
	}
	if c.EventID == e.ID {
		r.send(e)
		return nil
	}
	r.mu.Lock()
	s, isState := e.State()
	replaced := isState && r.state[s] != c.EventID && r.newer(r.state[s], e.ID)
	r.mu.Unlock()
	if replaced {
		return &DropError{Reason: Replaced}
	}
	return r.input(ctx, e, c)
}

// Send builds a delayed event, and records it in delayed.
func (r *fakeRoomserver) Send(ctx context.Context, t Timer, _ Outcome, claim func(context.Context, Built) error) (string, error) {
	if err := cmp.Or(r.call(func(h hooks) func(Event) error { return h.beforeClaim }, t.Event), ctx.Err()); err != nil {
		return "", err
	}
	r.mu.Lock()
	r.built++
	over := ""
	if s, ok := t.Event.State(); ok {
		over = r.state[s]
	}
	b := Built{
		EventID: fmt.Sprintf("$delayed%d", r.built), RoomID: t.Event.RoomID, Type: t.Event.Type, StateKey: t.Event.StateKey,
		RoomVersion: "10", PDU: r.write(t.Event.RoomID, fakePDU{Content: string(t.Delayed.Content), Over: over}), Closable: true,
	}
	never := r.never[string(t.Delayed.Content)]
	same := ""
	if s, ok := t.Event.State(); ok && slices.ContainsFunc(r.delayed, func(e sentEvent) bool {
		return e.eventID == r.state[s] && e.content == string(t.Delayed.Content)
	}) {
		same = r.state[s]
	}
	r.mu.Unlock()
	if never != "" {
		return "", &RefusedError{Code: 403, Response: []byte(`{"errcode":"M_FORBIDDEN"}`)}
	}
	if same != "" {
		return same, nil
	}
	if err := claim(ctx, b); err != nil {
		return "", err
	}
	return b.EventID, r.inputDelayed(ctx, t.Event, b.Signed())
}

func (r *fakeRoomserver) inputDelayed(ctx context.Context, e Event, signed SignedEvent) error {
	if err := r.answers(ctx, e.RoomID); err != nil {
		return err
	}
	if err := r.call(func(h hooks) func(Event) error { return h.afterClaim }, e); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.events[signed.EventID] > 0 {
		return nil
	}
	p := r.read(e.RoomID, signed)
	r.delayed = append(r.delayed, sentEvent{signed.EventID, p.Content, time.Now()})
	e.ID = signed.EventID
	s, _ := e.State()
	if current := r.state[s]; r.newer(current, p.Over) {
		defer func() { r.state[s] = current }()
	}
	r.put(e)
	return nil
}

func (r *fakeRoomserver) Replaced(_ context.Context, t Timer) (bool, error) {
	if err := r.call(func(h hooks) func(Event) error { return h.look }, t.Event); err != nil {
		return false, err
	}
	s, _ := t.Event.State()
	r.mu.Lock()
	current := r.state[s]
	replaced := r.newer(current, t.Event.ID)
	if t.Delayed != nil {
		replaced = current != "" && current != t.Delayed.Over && r.senders[current] != t.Event.Sender
	}
	r.mu.Unlock()
	return replaced, r.call(func(h hooks) func(Event) error { return h.looked }, t.Event)
}

func (r *fakeRoomserver) CurrentState(_ context.Context, s StateKey) (string, error) {
	err := r.call(func(h hooks) func(Event) error { return h.look }, Event{RoomID: s.RoomID, Type: s.Type, StateKey: &s.Key})
	return r.current(s), err
}

// newer reports whether one event became known after another.
func (r *fakeRoomserver) newer(current, eventID string) bool {
	return r.events[eventID] > 0 && r.events[current] > r.events[eventID]
}

// know makes an event known.
func (r *fakeRoomserver) know(eventID string) {
	if r.events[eventID] == 0 {
		r.events[eventID] = len(r.events) + 1
	}
}

func (r *fakeRoomserver) current(s StateKey) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state[s]
}

// setBack makes an older event the current state again.
func (r *fakeRoomserver) setBack(s StateKey, eventID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state[s] = eventID
}

// sendRemote sends a state event of another server and returns its ID.
func (r *fakeRoomserver) sendRemote(roomID, eventType, key string) string {
	e := Event{ID: "$remote in " + roomID, RoomID: roomID, Type: eventType, StateKey: &key}
	r.send(e)
	return e.ID
}

// sent returns the delayed events that the rooms have got.
func (r *fakeRoomserver) sent() []sentEvent {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.delayed)
}

// closings returns the closing events that the rooms have got.
func (r *fakeRoomserver) closings() []closing {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.log)
}
