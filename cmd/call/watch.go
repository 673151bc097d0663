package main

import (
	"strings"
	"sync"
	"time"

	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

const (
	// memberType is the type of the state events with which Element Call joins and leaves a call, and callSlot is the slot that it uses.
	memberType, callSlot = "org.matrix.msc3401.call.member", "m.call#ROOM"
)

// watch makes the lines about participants from what passes by: the rooms' events, the connections to LiveKit, and the requests that hand
// over leave events. It says only what it has seen.
type watch struct {
	screen *screen

	mu           sync.Mutex // guards the fields below
	names        map[string]string
	participants map[livekit.Participant]*participant
	members      map[memberKey]livekit.Participant
}

// memberKey is the place of a membership in the state of a room.
type memberKey struct{ roomID, stateKey string }

// participant is a device that is in a call, or connected to LiveKit.
type participant struct {
	joined      bool // there is a membership in the room, which the others see
	kept        bool // the homeserver has taken over the leave event
	connections int  // to LiveKit: two for a moment if the device comes back before LiveKit notices that it was away
	lost        time.Time
}

func newWatch(s *screen) *watch {
	return &watch{
		screen: s, names: map[string]string{}, participants: map[livekit.Participant]*participant{}, members: map[memberKey]livekit.Participant{},
	}
}

// change changes what is known about a participant. A participant about whom nothing is known any more is forgotten.
func (w *watch) change(p livekit.Participant, change func(now *participant, say func(format string, args ...any))) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changeWithMu(p, change)
}

func (w *watch) changeWithMu(p livekit.Participant, change func(now *participant, say func(format string, args ...any))) {
	now := w.participants[p]
	if now == nil {
		now = &participant{}
		w.participants[p] = now
	}
	change(now, func(format string, args ...any) {
		if name := w.nameWithMu(p); name != "" {
			w.screen.say(name, format, args...)
		}
	})
	if !now.joined && now.connections == 0 {
		delete(w.participants, p)
	}
}

// nameWithMu returns the display name of a participant, or "". The identity of a member of a call is user ID, colon, device ID. Element Call
// also opens connections with other identities, which belong to no membership and are not shown.
func (w *watch) nameWithMu(p livekit.Participant) string {
	for user, name := range w.names {
		if strings.HasPrefix(p.Identity, user+":") {
			return name
		}
	}
	return ""
}

// connected is called when LiveKit has accepted a connection.
func (w *watch) connected(p livekit.Participant) {
	w.change(p, func(now *participant, say func(string, ...any)) {
		now.connections++
		switch {
		case now.connections > 1:
		case now.lost.IsZero():
			say("connected to LiveKit")
		default:
			say("connected to LiveKit again, after %.1f s", time.Since(now.lost).Seconds())
		}
		now.lost = time.Time{}
	})
}

// disconnected is called when a connection has ended, from either side.
func (w *watch) disconnected(p livekit.Participant) {
	w.change(p, func(now *participant, say func(string, ...any)) {
		if now.connections--; now.connections > 0 || !now.joined {
			return
		}
		now.lost = time.Now()
		say("disconnected from LiveKit, but still in the call for the others")
	})
}

// handedOver is called when the homeserver has taken over the leave event.
func (w *watch) handedOver(p livekit.Participant) {
	w.change(p, func(now *participant, say func(string, ...any)) {
		if !now.kept {
			say("kept alive by the SFU: the homeserver has the leave event, and sends it when LiveKit loses the participant")
		}
		now.kept = true
	})
}

// event is called with each event that comes into a room, in the room's order.
func (w *watch) event(e gjson.Result) {
	w.mu.Lock()
	defer w.mu.Unlock()
	roomID, sender, content := e.Get("room_id").Str, e.Get("sender").Str, e.Get("content")
	switch e.Get("type").Str {
	case "m.room.member":
		if name := content.Get("displayname").Str; name != "" && e.Get("state_key").Str == sender {
			w.names[sender] = name
		}
	case memberType:
		key := memberKey{roomID, e.Get("state_key").Str}
		if device := content.Get("device_id").Str; device != "" {
			w.members[key] = livekit.Participant{Room: livekit.RoomName(roomID, callSlot), Identity: sender + ":" + device}
			w.changeWithMu(w.members[key], joined)
		} else if p, known := w.members[key]; known {
			delete(w.members, key)
			w.changeWithMu(p, left)
		}
	}
}

func joined(now *participant, say func(string, ...any)) {
	if !now.joined {
		say("joined the call")
	}
	now.joined = true
}

func left(now *participant, say func(string, ...any)) {
	if now.lost.IsZero() {
		say("left")
	} else {
		say("gone after %.1f s: the leave event is in the room", time.Since(now.lost).Seconds())
	}
	now.joined, now.kept = false, false
}
