//go:build all

package hostile

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// attack is an action that hostile users repeat.
type attack struct {
	name string
	// once performs the action once.
	once func(ctx context.Context, a *attacker)
	// open means that the attack needs no account.
	open bool
}

// attacks are all attacks. Those that could end the process come last.
var attacks = []attack{
	{name: "deep content", once: deepContent},
	{name: "deep state on a shared key", once: deepState},
	{name: "type and state key without end", once: endlessNames},
	{name: "due in the same instant", once: sameInstant},
	{name: "schedule, restart, cancel", once: flood},
	{name: "events that nothing can send", once: unsendable},
	{name: "expiring events that nothing can close", once: unclosable},
	{name: "large lists polled", once: largeLists},
	{name: "unknown tokens", once: unknownTokens, open: true},
	{name: "room summaries", once: summaries, open: true},
	{name: "content that panics", once: panicking},
}

// nested returns content with the given depth of nesting.
func nested(depth int) []byte {
	return []byte(`{"a":` + strings.Repeat("[", depth) + strings.Repeat("]", depth) + "}")
}

// deepContent schedules content that is too deep for the roomserver, which cannot decode the event and never answers.
func deepContent(ctx context.Context, a *attacker) {
	a.delay(ctx, a.nextRoom(), "m.room.message", "-", 50*time.Millisecond, nested(10_000))
}

// deepState schedules such content as a piece of state that another user sets as well.
func deepState(ctx context.Context, a *attacker) {
	a.delay(ctx, a.s.shared, "m.call.member", "shared", 50*time.Millisecond, nested(10_000))
}

// endlessNames schedules events with long types and state keys, which a server would store and repeat in each list.
func endlessNames(ctx context.Context, a *attacker) {
	room := a.nextRoom()
	a.delay(ctx, room, strings.Repeat("t", 1_000_000), "-", time.Hour, JSON{})
	a.delay(ctx, room, "m.call.member", strings.Repeat("k", 200_000), time.Hour, JSON{})
	a.do(ctx, http.MethodGet, unstablePath, nil)
}

// sameInstant schedules as many events as allowed for the next multiple of two seconds.
func sameInstant(ctx context.Context, a *attacker) {
	const interval = 2 * time.Second
	now := time.Now()
	a.delay(ctx, a.nextRoom(), "m.room.message", "-", now.Truncate(interval).Add(interval).Sub(now)+time.Millisecond, JSON{"body": "x"})
}

func flood(ctx context.Context, a *attacker) {
	id := a.delay(ctx, a.nextRoom(), "m.room.message", "-", time.Minute, JSON{"body": "x"})
	if id == "" {
		time.Sleep(5 * time.Millisecond)
		return
	}
	a.act(ctx, id, "restart")
	a.act(ctx, id, "restart")
	a.act(ctx, id, "cancel")
}

// unsendable schedules events that Dendrite can never send.
func unsendable(ctx context.Context, a *attacker) {
	room, soon := a.nextRoom(), 50*time.Millisecond
	a.delay(ctx, room, "m.room.create", "", soon, JSON{})
	a.delay(ctx, room, "m.room.create", "-", soon, JSON{})
	a.delay(ctx, room, "m.room.canonical_alias", "", soon, JSON{"alias": 1})
	a.delay(ctx, room, "m.room.member", a.UserID, soon, JSON{"membership": 1})
	a.delay(ctx, room, "m.room.third_party_invite", "x", soon, JSON{"public_keys": 1})
}

// unclosable sends expiring state whose closing event Dendrite refuses. In one case the refusal is due to the sender's own loss of power.
func unclosable(ctx context.Context, a *attacker) {
	room := a.nextRoom()
	for eventType, content := range map[string]JSON{
		"m.room.canonical_alias": {"alias": ""},
		"m.room.aliases":         {"aliases": []string{}},
		"m.room.power_levels":    {"users": JSON{a.UserID: 100}, "events": JSON{}},
	} {
		content["m.will_expire"] = 1
		a.do(ctx, http.MethodPut, homeserver.StatePath(room, eventType, ""), content)
	}
}

// largeLists schedules large events, and requests the list of all of them.
func largeLists(ctx context.Context, a *attacker) {
	if a.n.Add(1)%8 == 0 {
		a.delay(ctx, a.nextRoom(), "m.room.message", "-", time.Hour, JSON{"body": strings.Repeat("x", 60_000)})
	}
	a.do(ctx, http.MethodGet, unstablePath, nil)
}

// forged returns a header that claims a new address each time.
func forged() []string {
	ip := make([]byte, 4)
	_, _ = rand.Read(ip)
	return []string{"X-Forwarded-For", fmt.Sprintf("%d.%d.%d.%d", ip[0], ip[1], ip[2], ip[3])}
}

func unknownTokens(ctx context.Context, a *attacker) {
	a.do(ctx, http.MethodPut, "/_matrix/client/v3/expiration/refresh", JSON{"expire_refresh_token": rand.Text()}, forged()...)
	a.do(ctx, http.MethodPost, unstablePath+"/"+rand.Text()+"/restart", JSON{}, forged()...)
}

// summaries requests the summaries of a public room and of an unknown one.
func summaries(ctx context.Context, a *attacker) {
	for _, room := range []string{a.s.shared, "!unknown:localhost"} {
		a.do(ctx, http.MethodGet, "/_matrix/client/v1/room_summary/"+url.PathEscape(room), nil, forged()...)
	}
}

// panicking schedules content with which Dendrite panics when it builds the event.
func panicking(ctx context.Context, a *attacker) {
	a.delay(ctx, a.pseudo, "m.room.power_levels", "", 50*time.Millisecond, JSON{"users": 1})
}
