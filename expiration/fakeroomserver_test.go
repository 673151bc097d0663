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

// fakeRoomserver is a Roomserver whose state changes by the test and by closing events.
type fakeRoomserver struct {
	mu     sync.Mutex
	state  map[StateKey]string   // the IDs of the current events
	events map[string]int        // the number of each known event, in the order in which they became known
	stored map[string]stored     // the events that a crash has left stored and not sent
	never  map[string]DropReason // the reason why an event gets no closing event, by event ID
	last   map[string][]string   // the forward extremities, by room
	log    []closing             // the closing events, in the order in which the rooms got them
	// delayed has the delayed events in the order in which the rooms got them.
	delayed []sentEvent
	begun   map[string]time.Time // when building a closing event began, by its ID
	built   int
	silent  map[string]bool // the rooms in which no event is answered

	hooks hooks
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

func newFakeRoomserver() *fakeRoomserver {
	return &fakeRoomserver{
		state: map[StateKey]string{}, events: map[string]int{}, stored: map[string]stored{},
		never: map[string]DropReason{}, begun: map[string]time.Time{}, last: map[string][]string{}, silent: map[string]bool{},
	}
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

// put is send without a change of the forward extremities. The caller holds fakeRoomserver.mu.
func (r *fakeRoomserver) put(e Event) {
	r.know(e.ID)
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
	if err := r.call(func(h hooks) func(Event) error { return h.afterClaim }, e); errors.Is(err, errFault) {
		return &NotTakenError{err}
	} else if err != nil {
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
	redacted := r.never[e.ID] == Redacted && r.events[c.EventID] == 0
	r.mu.Unlock()
	switch {
	case replaced:
		return &DropError{Reason: Replaced}
	case redacted:
		return &DropError{Reason: Redacted}
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
	if err := r.call(func(h hooks) func(Event) error { return h.afterClaim }, e); errors.Is(err, errFault) {
		return &NotTakenError{err}
	} else if err != nil {
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

func (r *fakeRoomserver) Replaced(_ context.Context, e Event) (bool, error) {
	if err := r.call(func(h hooks) func(Event) error { return h.look }, e); err != nil {
		return false, err
	}
	s, _ := e.State()
	r.mu.Lock()
	replaced := r.newer(r.state[s], e.ID)
	r.mu.Unlock()
	return replaced, r.call(func(h hooks) func(Event) error { return h.looked }, e)
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
