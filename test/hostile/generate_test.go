//go:build all

package hostile

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// The generator derives an input from a seed and an index, always the same one.

// messageTypes and stateTypes are the event types that Dendrite treats specially, with valid contents.
var (
	messageTypes = map[string]string{
		"m.room.message":    `{"msgtype":"m.text","body":"hello","m.mentions":{"user_ids":["<other>"]}}`,
		"m.room.encrypted":  `{"algorithm":"m.megolm.v1.aes-sha2","ciphertext":"x","session_id":"y"}`,
		"m.room.redaction":  `{"redacts":"$x","reason":"y"}`,
		"m.reaction":        `{"m.relates_to":{"rel_type":"m.annotation","event_id":"$x","key":"k"}}`,
		"m.call.member":     `{"application":"m.call","focus_active":{"type":"livekit"}}`,
		"m.room.name":       `{"name":"x"}`, // a message with the type of a state event
		"m.room.create":     `{"room_version":"10"}`,
		"m.room.member":     `{"membership":"join"}`,
		"m.poll.start":      `{"m.poll":{"question":{"m.text":[{"body":"?"}]},"answers":[{"m.id":"1"}]}}`,
		"m.room.message.ok": `{"m.new_content":{"body":"x"},"m.relates_to":{"rel_type":"m.replace","event_id":"$x"}}`,
	}
	stateTypes = map[string]string{
		"m.room.power_levels": `{"ban":50,"events":{"m.room.name":50},"events_default":0,"invite":0,"kick":50,"notifications":{"room":50},` +
			`"redact":50,"state_default":50,"users":{"<me>":100,"<other>":50},"users_default":0}`,
		"m.room.member": `{"membership":"join","displayname":"x","avatar_url":"mxc://x/y","is_direct":false,"reason":"r",` +
			`"join_authorised_via_users_server":"<me>","third_party_invite":{"display_name":"d","signed":{"mxid":"<other>","token":"t","signatures":{"x":{"ed25519:0":"y"}}}}}`,
		"m.room.create":                  `{"creator":"<me>","room_version":"10","m.federate":true,"predecessor":{"room_id":"!x:y","event_id":"$z"},"type":"m.space"}`,
		"m.room.join_rules":              `{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":"<room>"}]}`,
		"m.room.canonical_alias":         `{"alias":"#x:localhost","alt_aliases":["#y:localhost"]}`,
		"m.room.third_party_invite":      `{"display_name":"x","key_validity_url":"https://x/y","public_key":"z","public_keys":[{"public_key":"a","key_validity_url":"https://b"}]}`,
		"m.room.tombstone":               `{"body":"x","replacement_room":"!x:localhost"}`,
		"m.room.redaction":               `{"redacts":"$x"}`,
		"m.room.aliases":                 `{"aliases":["#x:localhost"]}`,
		"m.room.server_acl":              `{"allow":["*"],"deny":["evil"],"allow_ip_literals":false}`,
		"m.room.encryption":              `{"algorithm":"m.megolm.v1.aes-sha2","rotation_period_ms":604800000,"rotation_period_msgs":100}`,
		"m.room.history_visibility":      `{"history_visibility":"shared"}`,
		"m.room.guest_access":            `{"guest_access":"can_join"}`,
		"m.room.pinned_events":           `{"pinned":["$x"]}`,
		"m.room.name":                    `{"name":"x"}`,
		"m.room.topic":                   `{"topic":"x","m.topic":{"m.text":[{"body":"x"}]}}`,
		"m.room.avatar":                  `{"url":"mxc://x/y","info":{"h":1,"w":1}}`,
		"m.space.child":                  `{"via":["localhost"],"order":"a","suggested":true}`,
		"m.call.member":                  `{"application":"m.call","memberships":[{"call_id":"","expires":3600000}]}`,
		"org.matrix.msc3401.call.member": `{"application":"m.call","call_id":"","device_id":"D","focus_active":{"type":"livekit"},"foci_preferred":[],"expires":100}`,
	}
	sortedMessages, sortedState = sortedKeys(messageTypes), sortedKeys(stateTypes)
)

// oddTypes are event types in the form they have in a path: empty, too long, with NUL, not UTF-8, percent-encoded.
var oddTypes = []string{
	"a%00b", "%ff", "%ff%fe", "%c3%28", "m.room.%6dessage", "%2F", "%25", "%20", "%0a", "%22", "%5Cu0000", "..", "%2e%2e", "m%E2%80%8B",
	"<pad:254>", "<pad:255>", "<pad:256>", "<pad:4000>", "<pad:70000>", "<pad:1000000>", strings.Repeat("%C3%A9", 127), strings.Repeat("%C3%A9", 128), "",
}

// oddKeys are odd state keys in the same form.
var oddKeys = []string{
	"", "@", "@a", "@:", "@:localhost", "nocolon", "%00", "a%00b", "%ff", "%F0%9F%92%A9", "%2F", "%25", "..", "<me>_DEVICE", "_<me>_DEVICE_m.call",
	"<pad:254>", "<pad:255>", "<pad:256>", "<pad:4000>", "<pad:200000>", "@<pad:300>:localhost", "@a:<pad:300>", "!room:localhost",
	"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "ljLN6SnLMTdiiUmNnfcP4DKTSbbpbRVLcLfR4Sp4wPM", // as user keys in rooms with pseudo IDs
}

// generate returns the input with the given index.
func generate(seed, index uint64, versions []string) *input {
	r := rand.New(rand.NewPCG(seed, index))
	in := &input{Name: fmt.Sprintf("seed %d index %d", seed, index), Version: versionOf(r, index, versions)}
	in.Form = pick(r, []form{expiring, query, query, dedicated, unstable})
	in.DelayMS = 1 + r.IntN(pick(r, []int{1, 20, 1000, 3000}))
	if in.Form == expiring || r.IntN(5) == 0 {
		in.Expires = 1 + r.IntN(3)
	}
	content := in.chooseType(r)
	in.Content = hostileContent(r, content)
	if r.IntN(12) == 0 {
		in.Timestamp = pick(r, []string{"0", "1", "-1", "1700000000000", "9007199254740991", "9223372036854775807", "x", "1.5", "+5"})
	}
	if r.IntN(60) == 0 {
		in.Room = pick(r, []string{"nope", "!", "!x", "!nobody:localhost", "!a:b:c", "%23x:localhost", "%00", "!%00:localhost", "!%ff:localhost", strings.Repeat("r", 300)})
	}
	in.Repeat = r.IntN(10) == 0
	if r.IntN(2) == 0 {
		in.Action = pick(r, []string{"send", "send", "restart", "restart", "cancel", "cancel", "look", "list"})
		if in.Form == expiring {
			in.Action = pick(r, []string{"refresh", "refresh", "end", "end", "send"})
		}
		in.AfterMS = r.IntN(in.DelayMS + 200)
		if in.Form == expiring {
			in.AfterMS = r.IntN(in.Expires*1000 + 200)
		}
	}
	return in
}

// versionOf returns a room version. Creating rooms takes long, so a user has rooms of two versions at a time. All users together cover all
// versions, and in the course of the test each user does.
func versionOf(r *rand.Rand, index uint64, versions []string) string {
	const forInputs = 2000
	user := int(index % hostileUsers)
	return versions[(2*user+r.IntN(2)+int(index/forInputs))%len(versions)]
}

// chooseType sets type and state key, and returns valid content for the type.
func (in *input) chooseType(r *rand.Rand) string {
	state := r.IntN(3) > 0
	types, contents := sortedMessages, messageTypes
	if state {
		types, contents = sortedState, stateTypes
	}
	in.Type = pick(r, types)
	content := contents[in.Type]
	if r.IntN(25) == 0 {
		in.Type = pick(r, oddTypes)
	} else if r.IntN(60) == 0 {
		in.Type = randomBytes(r)
	}
	if state {
		key := stateKey(r, in.Type)
		in.StateKey = &key
	}
	return content
}

// stateKey returns a state key, which mostly is one that suits the type.
func stateKey(r *rand.Rand, eventType string) string {
	if r.IntN(6) == 0 {
		return pick(r, oddKeys)
	}
	if r.IntN(40) == 0 {
		return randomBytes(r)
	}
	switch eventType {
	case "m.room.member":
		return pick(r, []string{"<me>", "<me>", "<other>", "@nobody:localhost", "@nobody:elsewhere"})
	case "m.room.third_party_invite":
		return "token"
	case "m.room.aliases":
		return "localhost"
	case "m.space.child":
		return "!child:localhost"
	case "m.call.member", "org.matrix.msc3401.call.member":
		return pick(r, []string{"<me>", "<other>", "key1", "key2", "_<me>_D_m.call"})
	default:
		return ""
	}
}

// randomBytes returns a few bytes, percent-encoded.
func randomBytes(r *rand.Rand) string {
	var s strings.Builder
	for range 1 + r.IntN(20) {
		fmt.Fprintf(&s, "%%%02x", r.IntN(256))
	}
	return s.String()
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }
