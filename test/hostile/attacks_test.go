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

// attack is something that hostile users do again and again.
type attack struct {
	name string
	// once does it once.
	once func(ctx context.Context, a *attacker)
	// open is set if it needs no account.
	open bool
}

// attacks are all of them. Those that end the process come last.
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

// nested returns a content that is nested so deeply.
func nested(depth int) []byte {
	return []byte(`{"a":` + strings.Repeat("[", depth) + strings.Repeat("]", depth) + "}")
}

// Row 2: what the roomserver cannot decode is never answered.
func deepContent(ctx context.Context, a *attacker) {
	a.delay(ctx, a.nextRoom(), "m.room.message", "-", 50*time.Millisecond, nested(10_000))
}

// Row 3: the same as state that somebody else sets.
func deepState(ctx context.Context, a *attacker) {
	a.delay(ctx, a.s.shared, "m.call.member", "shared", 50*time.Millisecond, nested(10_000))
}

// Row 5: names are stored, and told again by each list.
func endlessNames(ctx context.Context, a *attacker) {
	room := a.nextRoom()
	a.delay(ctx, room, strings.Repeat("t", 1_000_000), "-", time.Hour, JSON{})
	a.delay(ctx, room, "m.call.member", strings.Repeat("k", 200_000), time.Hour, JSON{})
	a.do(ctx, http.MethodGet, unstablePath, nil)
}

// sameInstant schedules as much as it may for the next instant that is a multiple of two seconds.
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

// Row 6: Dendrite fails each time.
func unsendable(ctx context.Context, a *attacker) {
	room, soon := a.nextRoom(), 50*time.Millisecond
	a.delay(ctx, room, "m.room.create", "", soon, JSON{})
	a.delay(ctx, room, "m.room.create", "-", soon, JSON{})
	a.delay(ctx, room, "m.room.canonical_alias", "", soon, JSON{"alias": 1})
	a.delay(ctx, room, "m.room.member", a.UserID, soon, JSON{"membership": 1})
	a.delay(ctx, room, "m.room.third_party_invite", "x", soon, JSON{"public_keys": 1})
}

// unclosable sends expiring state whose closing event Dendrite refuses, or that is refused because its sender has no power any more.
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

// largeLists fills the list of a user, and reads it.
func largeLists(ctx context.Context, a *attacker) {
	if a.n.Add(1)%8 == 0 {
		a.delay(ctx, a.nextRoom(), "m.room.message", "-", time.Hour, JSON{"body": strings.Repeat("x", 60_000)})
	}
	a.do(ctx, http.MethodGet, unstablePath, nil)
}

// forged returns a header that names another address each time.
func forged() []string {
	ip := make([]byte, 4)
	_, _ = rand.Read(ip)
	return []string{"X-Forwarded-For", fmt.Sprintf("%d.%d.%d.%d", ip[0], ip[1], ip[2], ip[3])}
}

func unknownTokens(ctx context.Context, a *attacker) {
	a.do(ctx, http.MethodPut, "/_matrix/client/v3/expiration/refresh", JSON{"expire_refresh_token": rand.Text()}, forged()...)
	a.do(ctx, http.MethodPost, unstablePath+"/"+rand.Text()+"/restart", JSON{}, forged()...)
}

// Row 12.
func summaries(ctx context.Context, a *attacker) {
	for _, room := range []string{a.s.shared, "!unknown:localhost"} {
		a.do(ctx, http.MethodGet, "/_matrix/client/v1/room_summary/"+url.PathEscape(room), nil, forged()...)
	}
}

// Row 1: Dendrite panics when it builds the event.
func panicking(ctx context.Context, a *attacker) {
	a.delay(ctx, a.pseudo, "m.room.power_levels", "", 50*time.Millisecond, JSON{"users": 1})
}
