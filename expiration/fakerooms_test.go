package expiration

import (
	"slices"
	"time"
)

// What a test does with the rooms of a fakeRoomserver: it sends events, sets the state back, makes steps fail, and reads what the rooms got.

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

// takes returns a hook that takes time.
func takes(d time.Duration) func(Event) error {
	return func(Event) error { time.Sleep(d); return nil }
}

// fails is a hook that fails in passing.
func fails(Event) error { return errFault }

// attempts returns the number of closing events that were built.
func (r *fakeRoomserver) attempts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.built
}

// closing is a closing event that a room has got.
type closing struct {
	eventID, closes, roomID string
	outcome                 Outcome
	over                    string // the previous current state, if it is state
	built                   time.Time
	at                      time.Time
	sent                    time.Time // as the closing event says
}

// sentEvent is a delayed event that a room has got.
type sentEvent struct {
	eventID, content string
	at               time.Time
}

// refuse makes the roomserver accept no closing event for an event.
func (r *fakeRoomserver) refuse(eventID string, reason DropReason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.never[eventID] = reason
}

// silence makes a room's worker stop answering, or answer again.
func (r *fakeRoomserver) silence(roomID string, silent bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.silent[roomID] = silent
}

// store makes an event known in the state in which a crash leaves one half done.
func (r *fakeRoomserver) store(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.know(e.ID)
	s, _ := e.State()
	r.stored[e.ID] = stored{e, r.state[s]}
}

// send makes an event known, and current if it is state.
func (r *fakeRoomserver) send(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[e.RoomID] = []string{e.ID}
	r.put(e)
}

// sendRemote sends a state event of another server and returns its ID.
func (r *fakeRoomserver) sendRemote(roomID, eventType, key string) string {
	e := Event{ID: "$remote in " + roomID, RoomID: roomID, Type: eventType, StateKey: &key}
	r.send(e)
	return e.ID
}

// setBack makes an older event the current state again.
func (r *fakeRoomserver) setBack(s StateKey, eventID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state[s] = eventID
}

func (r *fakeRoomserver) current(s StateKey) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state[s]
}

// has reports whether an event is in its room; a stored event is not.
func (r *fakeRoomserver) has(eventID string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, stored := r.stored[eventID]
	return r.events[eventID] > 0 && !stored
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
