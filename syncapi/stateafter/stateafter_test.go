package stateafter

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"slices"
	"testing"

	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

// State that state resolution sets together with some other event is reported once, even if Dendrite's answer does not have the room. A
// state event without effect is not reported.
func TestStateByResolution(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, h *history) {
		c := h.client(alice, "")
		first, position := h.send("m.room.topic", "", alice, `{"topic":"first"}`)
		c.sync(position, "join", `{}`)
		require.Equal(t, h.state, c.known)

		second, _ := h.send("m.room.topic", "", alice, `{"topic":"second"}`)
		position = h.say([]*rstypes.HeaderedEvent{h.roomserver.events[first]}) // the first wins after all
		require.Equal(t, []string{first}, c.sync(position, "join", `{"timeline":{"events":[{"type":"m.room.topic","event_id":"`+second+`"}]}}`))

		loser := h.event("m.room.topic", "", bob, `{"topic":"loser"}`)
		require.Empty(t, c.sync(h.write(loser, nil), "join", `{"state":{"events":[]}}`))
		require.Equal(t, "[]", c.told().Raw)

		outlier := h.event("m.room.name", "", alice, `{"name":"in no timeline"}`)
		position = h.say([]*rstypes.HeaderedEvent{outlier})
		require.Equal(t, []string{outlier.EventID()}, c.sync(position, "", ""))
		require.Equal(t, h.state, c.known)
		require.Empty(t, c.sync(h.say(nil), "", ""))
		require.False(t, c.last.Get("rooms").Exists())
	})
}

// State from after the answer's next_batch is not in the answer, but in the next one.
func TestStateAtNextBatch(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, h *history) {
		first, early := h.send("m.room.topic", "", alice, `{"topic":"first"}`)
		second, _ := h.send("m.room.topic", "", alice, `{"topic":"second"}`)
		h.say([]*rstypes.HeaderedEvent{h.roomserver.events[first]})
		third, late := h.send("m.room.topic", "", alice, `{"topic":"third"}`)
		lost, _ := h.send("m.room.name", "", alice, `{"name":"x"}`)
		h.say(nil, "m.room.name|")

		c := h.client(alice, "")
		require.NotContains(t, c.sync(early-1, "join", `{}`), first)
		require.Equal(t, []string{first}, c.sync(early, "join", `{}`))
		require.Equal(t, []string{second}, c.sync(early+1, "join", `{}`))
		require.Equal(t, []string{third}, c.sync(late, "join", `{}`))
		require.NotContains(t, c.known, lost)
		require.Empty(t, c.sync(early, "join", `{}`), "back in time")

		whole := h.client(alice, "")
		require.Contains(t, whole.sync(early+1, "join", `{}`), second)
		whole.query.Set("full_state", "true")
		require.Contains(t, whole.sync(late, "join", `{}`), third)
	})
}

// A user who has entered the room gets the whole state, even if the current member event is not the one that made the user enter.
func TestStateOfWhoComesIn(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, h *history) {
		c := h.client(bob, "")
		_, before := h.send("m.room.topic", "", alice, `{"topic":"old"}`)
		c.sync(before, "", "")
		joined := h.event("m.room.member", bob, bob, `{"membership":"join"}`)
		h.say([]*rstypes.HeaderedEvent{joined}) // by resolution
		_, position := h.send("m.room.member", bob, bob, `{"membership":"join","displayname":"Bob"}`)
		c.sync(position, "join", `{}`)
		require.Equal(t, h.state, c.known)
		named, position := h.send("m.room.member", bob, bob, `{"membership":"join","displayname":"Robert"}`)
		require.Equal(t, []string{named}, c.sync(position, "join", `{}`))

		// Bob leaves and enters again between two syncs.
		h.send("m.room.member", bob, bob, `{"membership":"leave"}`)
		_, position = h.send("m.room.member", bob, bob, `{"membership":"join"}`)
		require.ElementsMatch(t, slices.Collect(maps.Values(h.state)), c.sync(position, "join", `{}`))

		// Bob leaves by state resolution: his member event is now an older one.
		invite := h.event("m.room.member", bob, alice, `{"membership":"invite"}`)
		left := h.say([]*rstypes.HeaderedEvent{invite})
		_, position = h.send("m.room.topic", "", alice, `{"topic":"not for bob"}`)
		require.Equal(t, []string{invite.EventID()}, c.sync(position, "leave", `{}`))
		require.Positive(t, left)
	})
}

// A user who enters a room only after the answer's next_batch gets none of its state, unless Dendrite's answer has the room. A user who was
// out of the room and is back gets the whole state, even if the member event had simply vanished.
func TestStateOfWhoIsOut(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, h *history) {
		c := h.client(bob, "")
		_, before := h.send("m.room.member", bob, alice, `{"membership":"invite"}`)
		c.sync(before, "", "")
		_, position := h.send("m.room.topic", "", alice, `{"topic":"b"}`)
		_, joined := h.send("m.room.member", bob, bob, `{"membership":"join"}`)
		require.Empty(t, c.sync(position, "", ""))
		c.sync(joined, "join", `{}`)
		require.Equal(t, h.state, c.known)

		topic := h.event("m.room.topic", "", alice, `{"topic":"c"}`)
		h.write(topic, []*rstypes.HeaderedEvent{topic}, "m.room.member|"+bob)
		_, position = h.send("m.room.member", bob, bob, `{"membership":"join"}`)
		require.ElementsMatch(t, slices.Collect(maps.Values(h.state)), c.sync(position, "join", `{}`))
	})
}

// A refused invite is reported although the record has no event for it. When the room's own event arrives, that event is reported.
func TestRefusedInvite(t *testing.T) {
	const room = `{"timeline":{"events":[{"type":"m.room.member","sender":"@bob:localhost","state_key":"@bob:localhost",
		"event_id":"$made-up","content":{"membership":"leave"}}]}}`
	onEachDatabase(t, func(t *testing.T, h *history) {
		c := h.client(bob, "")
		_, position := h.send("m.room.member", bob, alice, `{"membership":"invite"}`)
		c.sync(position, "", "")
		require.Equal(t, []string{"$made-up"}, c.sync(h.say(nil), "leave", room))
		refused, position := h.send("m.room.member", bob, bob, `{"membership":"leave"}`)
		require.Equal(t, []string{refused}, c.sync(position, "leave", room))
		c = h.client(bob, `{"room":{"state":{"not_types":["m.room.member"]}}}`)
		require.Empty(t, c.sync(position, "leave", room))
	})
}

// After a room's state was rewritten, a client gets the whole state, and nothing of what the rewriting removed. A sync up to an earlier
// position gets the current state instead of none.
func TestStateWrittenAnew(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, h *history) {
		_, before := h.send("m.room.topic", "", alice, `{"topic":"a"}`)
		c, late := h.client(alice, ""), h.client(alice, "")
		c.sync(before, "join", `{}`)
		h.send("m.room.topic", "", alice, `{"topic":"b"}`)
		h.send("m.room.name", "", alice, `{"name":"gone"}`)
		h.send("m.room.member", alice, alice, `{"membership":"join","displayname":"Alice"}`)
		h.state["m.room.topic|"] = h.event("m.room.topic", "", alice, `{"topic":"c"}`).EventID()
		h.rewrite("m.room.name|")
		want := slices.Collect(maps.Values(h.state))
		require.ElementsMatch(t, want, late.sync(before, "join", `{}`))
		require.ElementsMatch(t, want, c.sync(h.rewritten, "join", `{}`))

		_, before = h.send("m.room.member", bob, bob, `{"membership":"join"}`)
		gone := h.client(bob, "")
		gone.sync(before, "join", `{}`)
		h.send("m.room.topic", "", alice, `{"topic":"d"}`)
		h.state["m.room.topic|"] = h.event("m.room.topic", "", alice, `{"topic":"e"}`).EventID()
		h.rewrite("")
		_, position := h.send("m.room.member", bob, bob, `{"membership":"leave"}`)
		require.ElementsMatch(t, slices.Collect(maps.Values(h.state)), gone.sync(position, "leave", `{}`))
	})
}

// With lazy loading, a client gets the members that it needs, and those that have changed.
func TestLazyMembers(t *testing.T) {
	const lazily = `{"room":{"state":{"lazy_load_members":true}}}`
	onEachDatabase(t, func(t *testing.T, h *history) {
		for i := range 5 {
			user := fmt.Sprintf("@user%d:localhost", i)
			h.send("m.room.member", user, user, `{"membership":"join"}`)
		}
		members := func(c *client) (keys []string) {
			for _, e := range c.told().Array() {
				if e.Get("type").Str == spec.MRoomMember {
					keys = append(keys, e.Get("state_key").Str)
				}
			}
			slices.Sort(keys)
			return keys
		}
		c := h.client(alice, lazily)
		c.sync(h.say(nil), "join", `{"summary":{"m.heroes":["@user3:localhost"]},"timeline":{"events":[
			{"type":"m.room.message","sender":"@user1:localhost"},
			{"type":"m.room.member","sender":"@user1:localhost","state_key":"@user2:localhost"}]}}`)
		require.Equal(t, []string{alice, "@user1:localhost", "@user2:localhost", "@user3:localhost"}, members(c))
		require.Contains(t, c.known, "m.room.create|")

		_, position := h.send("m.room.member", "@user4:localhost", alice, `{"membership":"ban"}`)
		h.send("m.room.member", "@user0:localhost", "@user0:localhost", `{"membership":"join","displayname":"later"}`)
		const room = `{"state":{"events":[{"type":"m.room.member","state_key":"@user0:localhost"}]},
			"timeline":{"events":[{"type":"m.room.message","sender":"@user1:localhost"}]}}`
		since := c.query.Get("since")
		c.sync(position, "join", room)
		require.Equal(t, []string{"@user0:localhost", "@user4:localhost"}, members(c), "who changed, and whom Dendrite loaded")
		require.Equal(t, h.states[position]["m.room.member|@user0:localhost"], c.known["m.room.member|@user0:localhost"])

		c.query = url.Values{"since": {since}, "filter": {`{"room":{"state":{"lazy_load_members":true,"include_redundant_members":true}}}`}}
		c.sync(position, "join", room)
		require.Equal(t, []string{"@user0:localhost", "@user1:localhost", "@user4:localhost"}, members(c))
	})
}

// In random histories, a client has after each sync the state that the room had at next_batch.
func TestRandomHistories(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, h *history) {
		seed := rand.Uint64()
		random := rand.New(rand.NewPCG(seed, 0))
		t.Logf("seed %d", seed)
		var (
			all     []*rstypes.HeaderedEvent // events that state resolution may bring back
			clients []*client
			checked int
		)
		for range 250 {
			key := fmt.Sprint("key", random.IntN(4))
			switch what := random.IntN(20); {
			case what < 4:
				h.say(nil)
			case what < 12:
				eventID, _ := h.send("org.example", key, alice, `{}`)
				all = append(all, h.roomserver.events[eventID])
			case what < 14:
				h.write(h.event("org.example", key, bob, `{}`), nil)
			case what < 18 && len(all) > 0:
				old := all[random.IntN(len(all))]
				if h.state[keyOf(old)] != old.EventID() {
					h.say([]*rstypes.HeaderedEvent{old, h.event("org.outlier", key, alice, `{}`)})
				}
			case what == 18 && h.state["org.example|"+key] != "":
				h.say(nil, "org.example|"+key)
			case what == 19 && random.IntN(4) == 0:
				h.rewrite("org.outlier|" + key)
			}
			if random.IntN(10) == 0 {
				clients = append(clients, h.client(alice, ""))
			}
			for _, c := range clients {
				// The answer is for a position in the recent past.
				position := h.positions[max(0, len(h.positions)-1-random.IntN(6))]
				if position <= c.at || random.IntN(20) != 0 {
					continue
				}
				if c.at == 0 || random.IntN(2) == 0 {
					c.sync(position, "join", `{}`)
				} else {
					c.sync(position, "", "")
				}
				if position < h.rewritten {
					continue // the client may have got the current state, and will get it again with the event that rewrote it
				}
				want := h.states[position]
				for key, eventID := range want {
					require.Equal(t, eventID, c.known[key], "%s at %d", key, position)
				}
				for key := range c.known {
					require.True(t, want[key] != "" || h.deleted, "%s at %d", key, position)
				}
				checked++
			}
		}
		require.Greater(t, checked, 50)
	})
}
