package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

const testRoom = "!r:localhost"

// at returns a device at LiveKit.
func at(user, device string) livekit.Participant {
	return livekit.Participant{Room: livekit.RoomName(testRoom, callSlot), Identity: user + ":" + device}
}

// membership returns the event with which a device joins the call, or leaves it if the content is empty.
func membership(user, device, content string) gjson.Result {
	return gjson.Parse(fmt.Sprintf(`{"type": %q, "room_id": %q, "sender": %q, "state_key": "_%s_%s_m.call", "content": %s}`,
		memberType, testRoom, user, user, device, content))
}

func joins(w *watch, user, device string) {
	w.event(membership(user, device, fmt.Sprintf(`{"device_id": %q}`, device)))
}

func leaves(w *watch, user, device string) { w.event(membership(user, device, `{}`)) }

func hasName(w *watch, user, name string) {
	w.event(gjson.Parse(fmt.Sprintf(`{"type": "m.room.member", "room_id": %q, "sender": %q, "state_key": %[2]q, "content": {"displayname": %q}}`,
		testRoom, user, name)))
}

// What a sequence of observations prints.
func TestWatch(t *testing.T) {
	const alice, bob = "@a:localhost", "@b:localhost"
	in := func(w *watch) { // alice joins, as Element Call does it
		hasName(w, alice, "Alice")
		w.connected(at(alice, "A"))
		joins(w, alice, "A")
		w.handedOver(at(alice, "A"))
		time.Sleep(10 * time.Second)
	}
	const joined = "0.0 Alice connected to LiveKit|0.0 Alice joined the call|0.0 Alice kept alive by the SFU"
	for name, test := range map[string]struct {
		happens func(w *watch)
		want    string
	}{
		"joins": {in, joined},
		"crashes": {func(w *watch) {
			in(w)
			w.disconnected(at(alice, "A"))
			time.Sleep(20300 * time.Millisecond)
			leaves(w, alice, "A")
		}, joined + "|10.0 Alice disconnected from LiveKit, but still in the call for the others|30.3 Alice gone after 20.3 s"},
		"leaves, and then disconnects": {func(w *watch) {
			in(w)
			leaves(w, alice, "A")
			w.disconnected(at(alice, "A"))
		}, joined + "|10.0 Alice left"},
		"leaves, and joins again over the same connection": {func(w *watch) {
			in(w)
			leaves(w, alice, "A")
			joins(w, alice, "A")
			w.handedOver(at(alice, "A"))
		}, joined + "|10.0 Alice left|10.0 Alice joined the call|10.0 Alice kept alive by the SFU"},
		"comes back before anybody has noticed": {func(w *watch) {
			in(w)
			w.disconnected(at(alice, "A"))
			time.Sleep(2 * time.Second)
			w.connected(at(alice, "A"))
			time.Sleep(time.Second)
			leaves(w, alice, "A")
		}, joined + "|10.0 Alice disconnected from LiveKit, but still in the call for the others|12.0 Alice connected to LiveKit again, after 2.0 s|13.0 Alice left"},
		"a second connection replaces the first": {func(w *watch) {
			in(w)
			w.connected(at(alice, "A"))
			w.disconnected(at(alice, "A"))
		}, joined},
		"renews its membership, and hands over another leave event": {func(w *watch) {
			in(w)
			joins(w, alice, "A")
			w.handedOver(at(alice, "A"))
		}, joined},
		"joins again after a crash": {func(w *watch) {
			in(w)
			w.disconnected(at(alice, "A"))
			leaves(w, alice, "A")
			in(w)
		}, joined + "|10.0 Alice disconnected from LiveKit, but still in the call for the others|10.0 Alice gone after 0.0 s|" + strings.ReplaceAll(joined, "0.0 ", "10.0 ")},
		"two devices and two users": {func(w *watch) {
			hasName(w, alice, "Alice")
			hasName(w, bob, "Bob")
			joins(w, alice, "A")
			joins(w, alice, "B")
			joins(w, bob, "A")
			leaves(w, alice, "B")
			leaves(w, bob, "A")
		}, "0.0 Alice joined the call|0.0 Alice joined the call|0.0 Bob joined the call|0.0 Alice left|0.0 Bob left"},
		"a connection that belongs to no membership": {func(w *watch) {
			in(w)
			w.connected(livekit.Participant{Room: "hash", Identity: "hash"})
			w.disconnected(livekit.Participant{Room: "hash", Identity: "hash"})
		}, joined},
		"others' names and empty names are none": {func(w *watch) {
			hasName(w, alice, "Alice")
			hasName(w, alice, "")
			w.event(gjson.Parse(`{"type": "m.room.member", "sender": "@a:localhost", "state_key": "@b:localhost", "content": {"displayname": "Bob"}}`))
			joins(w, alice, "A")
		}, "0.0 Alice joined the call"},
		"leaves without having joined, connects without joining": {func(w *watch) {
			hasName(w, alice, "Alice")
			leaves(w, alice, "A")
			w.connected(at(alice, "A"))
			w.disconnected(at(alice, "A"))
		}, "0.0 Alice connected to LiveKit"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out bytes.Buffer
				w := newWatch(newScreen(&out))
				test.happens(w)
				var got []string
				for line := range strings.Lines(out.String()) {
					said := strings.Replace(strings.Join(strings.Fields(line), " "), "s ", " ", 1)
					for _, explained := range []string{"SFU", "gone after"} { // what is behind the colon is an explanation
						if before, _, found := strings.Cut(said, ": "); found && strings.Contains(before, explained) {
							said = before
						}
					}
					got = append(got, said)
				}
				require.Equal(t, strings.Split(test.want, "|"), got)
			})
		})
	}
}

// What has ended is forgotten.
func TestWatchForgets(t *testing.T) {
	w := newWatch(newScreen(&bytes.Buffer{}))
	w.connected(at("@a:localhost", "A"))
	joins(w, "@a:localhost", "A")
	leaves(w, "@a:localhost", "A")
	w.disconnected(at("@a:localhost", "A"))
	require.Empty(t, w.participants)
	require.Empty(t, w.members)
}
