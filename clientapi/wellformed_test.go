package clientapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/eventsize"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const (
	pseudoIDs = "org.matrix.msc4014"
	alice     = "@alice:localhost"
)

// state returns the target of a request that sends state.
func state(eventType, key string) target {
	return target{roomID: "!room:localhost", eventType: eventType, stateKey: &key}
}

// versioned is a roomserver whose rooms have one version.
type versioned struct {
	rooms
	version gomatrixserverlib.RoomVersion
}

func (v versioned) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return v.version, nil
}

// check makes all checks of an event that precede its scheduling.
func check(version gomatrixserverlib.RoomVersion, to target, content string, timestamp time.Time) error {
	a := &API{dendrite: &config.ClientAPI{}, rsAPI: versioned{version: version}}
	err := checkNames(to)
	if err == nil {
		err = webapi.CheckObject([]byte(content), "The content")
	}
	if err == nil {
		err = checkContent([]byte(content))
	}
	if err != nil {
		return err
	}
	d := expiration.Delayed{Timestamp: timestamp}
	return a.checkScheduled(context.Background(), &userapi.Device{UserID: alice}, to, d, []byte(content))
}

// An event that can be sent in some state of a room passes the checks.
func TestWellFormed(t *testing.T) {
	message := target{roomID: "!room:localhost", eventType: "m.room.message"}
	for name, test := range map[string]struct {
		to      target
		content string
		since   int // the first room version in which it can be sent
	}{
		"message":              {message, `{"msgtype":"m.text","body":"\u0000\ud800"}`, 1},
		"empty":                {state("m.call.member", ""), `{}`, 1},
		"own key":              {state("m.call.member", alice), `{}`, 1},
		"longest names":        {state(strings.Repeat("t", 255), strings.Repeat("k", 255)), `{}`, 1},
		"deepest":              {message, deep(jsondepth.Max), 1},
		"greatest integers":    {message, `{"a":9007199254740991,"b":-9007199254740991,"c":1.0,"d":1e3}`, 1},
		"profile":              {state("m.room.member", alice), `{"membership":"join","displayname":"A"}`, 1},
		"leave":                {state("m.room.member", alice), `{"membership":"leave"}`, 1},
		"null":                 {state("m.room.member", alice), `{"membership":"leave","displayname":null}`, 1},
		"invite":               {state("m.room.member", "@bob:localhost"), `{"membership":"invite"}`, 1},
		"kick":                 {state("m.room.member", "@bob:localhost"), `{"membership":"leave","reason":"late"}`, 1},
		"ban":                  {state("m.room.member", "@bob:elsewhere"), `{"membership":"ban"}`, 1},
		"invite by a token":    {state("m.room.member", "@bob:localhost"), invite("@bob:localhost", "token", signature), 1},
		"third-party invite":   {state("m.room.third_party_invite", "token"), `{"display_name":"B","public_keys":[]}`, 1},
		"power levels":         {state("m.room.power_levels", ""), `{"users":{"@alice:localhost":100,"@bob:localhost":50},"ban":75}`, 1},
		"alias":                {state("m.room.canonical_alias", ""), `{"alias":"#a:localhost","alt_aliases":["#b:localhost"]}`, 1},
		"no alias":             {state("m.room.canonical_alias", ""), `{}`, 1},
		"alternatives alone":   {state("m.room.canonical_alias", ""), `{"alt_aliases":["#b:localhost"]}`, 1},
		"join rules":           {state("m.room.join_rules", ""), `{"join_rule":"invite"}`, 1},
		"history visibility":   {state("m.room.history_visibility", ""), `{"history_visibility":"joined"}`, 1},
		"tombstone":            {state("m.room.tombstone", ""), `{"body":"moved","replacement_room":"!new:localhost"}`, 1},
		"other server's state": {state("m.room.topic", "key"), `{"topic":"x"}`, 1},
	} {
		for version := range gomatrixserverlib.RoomVersions() {
			number := 99
			_, _ = fmt.Sscan(string(version), &number)
			err := check(version, test.to, test.content, time.Time{})
			if number < test.since {
				require.Error(t, err, "%s, version %s", name, version)
				continue
			}
			if number == 99 && name == "longest names" || version == gomatrixserverlib.RoomVersionPseudoIDs && strings.HasPrefix(name, "invite") {
				continue
			}
			require.NoError(t, err, "%s, version %s", name, version)
		}
	}
	// Only a delayed knock is impossible.
	a := &API{dendrite: &config.ClientAPI{}, rsAPI: versioned{version: "10"}}
	content := []byte(`{"membership":"knock","m.will_expire":"running"}`)
	require.NoError(t, a.checkExpiring(t.Context(), &userapi.Device{UserID: alice}, state("m.room.member", alice), content))
}

// signature is one by a key that no room has, but could have.
const signature = `{"localhost":{"ed25519:0":"x"}}`

// invite returns the content of an invitation by a third party.
func invite(mxid, token, signatures string) string {
	return fmt.Sprintf(`{"membership":"invite","third_party_invite":{"display_name":"B","signed":{"mxid":%q,"token":%q,"signatures":%s}}}`,
		mxid, token, signatures)
}

// deep returns an object with this many levels.
func deep(levels int) string {
	return strings.Repeat(`{"a":`, levels-1) + `{}` + strings.Repeat(`}`, levels-1)
}

// An event that can be sent in no state of a room is refused. The answer is that of an ordinary send, or 400 where an ordinary send fails.
func TestNeverSendable(t *testing.T) {
	message := target{roomID: "!room:localhost", eventType: "m.room.message"}
	tooLarge := `{"a":"` + strings.Repeat("x", eventsize.Max) + `"}`
	bob := state("m.room.member", "@bob:localhost")
	as := func(membership string) string {
		return strings.Replace(invite("@bob:localhost", "token", signature), `"invite"`, `"`+membership+`"`, 1)
	}
	large := strings.Replace(invite("@bob:localhost", "token", signature), `"B"`, tooLarge[len(`{"a":`):eventsize.Max-1200]+`"`, 1)
	for name, test := range map[string]struct {
		version gomatrixserverlib.RoomVersion
		to      target
		content string
		code    int
		errcode string
		text    string // part of the message
	}{
		"long type":              {"10", state(strings.Repeat("t", 256), ""), `{}`, 413, "M_BAD_JSON", "type must be at most 255 bytes"},
		"long type of runes":     {"10", state(strings.Repeat("ä", 128), ""), `{}`, 413, "M_BAD_JSON", "type must be at most 255 bytes"},
		"long key":               {"10", state("m", strings.Repeat("k", 256)), `{}`, 413, "M_BAD_JSON", "state key must be at most 255 bytes"},
		"type is not UTF-8":      {"10", state("\xff", ""), `{}`, 400, "M_INVALID_PARAM", "type must be valid UTF-8"},
		"key is not UTF-8":       {"10", state("m", "\xff"), `{}`, 400, "M_INVALID_PARAM", "state key must be valid UTF-8"},
		"NUL in the type":        {"10", state("m\x00", ""), `{}`, 400, "M_INVALID_PARAM", "without NUL"},
		"NUL in the key":         {"10", state("m", "\x00"), `{}`, 400, "M_INVALID_PARAM", "without NUL"},
		"NUL in the room ID":     {"10", target{roomID: "!r\x00:localhost", eventType: "m"}, `{}`, 400, "M_INVALID_PARAM", "without NUL"},
		"no room ID":             {"10", target{roomID: "nope", eventType: "m"}, `{}`, 400, "M_INVALID_PARAM", "!room:server"},
		"long room ID":           {"10", target{roomID: "!" + strings.Repeat("r", 255) + ":x", eventType: "m"}, `{}`, 400, "M_INVALID_PARAM", "room ID"},
		"too deep":               {"10", message, deep(jsondepth.Max + 1), 400, "M_BAD_JSON", "200 levels"},
		"much too deep":          {"10", message, deep(15_000), 400, "M_BAD_JSON", "200 levels"},
		"NUL in a relation":      {"10", message, `{"m.relates_to":{"event_id":"$x","rel_type":"\u0000"}}`, 400, "M_BAD_JSON", "NUL"},
		"NUL in a redaction":     {"11", message, `{"redacts":"\u0000"}`, 400, "M_BAD_JSON", "NUL"},
		"fraction":               {"10", message, `{"a":0.5}`, 400, "M_BAD_JSON", ""},
		"greater than integers":  {"10", message, `{"a":9007199254740993}`, 400, "M_BAD_JSON", ""},
		"less than integers":     {"6", message, `{"a":[{"b":-9007199254740992}]}`, 400, "M_BAD_JSON", ""},
		"exponent":               {"6", message, `{"a":1e300}`, 400, "M_BAD_JSON", ""},
		"too large":              {"10", message, tooLarge, 413, "M_BAD_JSON", ""},
		"too large when sent":    {"10", message, tooLarge[:eventsize.Max-1200] + `"}`, 413, "M_BAD_JSON", "65536 bytes"},
		"too large in version 1": {"1", message, tooLarge[:eventsize.Max-5000] + `"}`, 413, "M_BAD_JSON", "65536 bytes"},
		"create":                 {"10", state("m.room.create", ""), `{}`, 403, "M_FORBIDDEN", "first event"},
		"create, no state":       {"10", target{roomID: "!room:localhost", eventType: "m.room.create"}, `{}`, 403, "M_FORBIDDEN", "first event"},
		"membership 1":           {"10", state("m.room.member", alice), `{"membership":1}`, 400, "M_BAD_JSON", "membership to be one of"},
		"no membership":          {"10", state("m.room.member", alice), `{}`, 403, "M_FORBIDDEN", "membership to be one of"},
		"unknown membership":     {"10", state("m.room.member", alice), `{"membership":"here"}`, 403, "M_FORBIDDEN", "membership to be one of"},
		"member is no state":     {"10", target{roomID: "!room:localhost", eventType: "m.room.member"}, `{"membership":"join"}`, 403, "M_FORBIDDEN", ""},
		"pseudo IDs, no user ID": {pseudoIDs, state("m.room.member", "@bob"), `{"membership":"leave"}`, 400, "M_INVALID_PARAM", "must be a user ID"},
		"joining others":         {"10", state("m.room.member", "@bob:localhost"), `{"membership":"join"}`, 403, "M_FORBIDDEN", ""},
		"inviting oneself":       {"10", state("m.room.member", alice), `{"membership":"invite"}`, 403, "M_FORBIDDEN", ""},
		"invite without a token": {"10", bob, invite("@bob:localhost", "", signature), 400, "M_BAD_JSON", ""},
		"invite of another":      {"10", bob, invite("@other:localhost", "token", signature), 403, "M_FORBIDDEN", ""},
		"invite, not signed":     {"10", bob, invite("@bob:localhost", "token", `{"localhost":{}}`), 403, "M_FORBIDDEN", ""},
		"invite, other key":      {"10", bob, invite("@bob:localhost", "token", `{"localhost":{"rsa:0":"x"}}`), 403, "M_FORBIDDEN", ""},
		"join by an invite":      {"10", bob, as("join"), 403, "M_FORBIDDEN", ""},
		"own join by an invite":  {"10", state("m.room.member", alice), as("join"), 403, "M_FORBIDDEN", ""},
		"word by an invite":      {"10", bob, as("banana"), 403, "M_FORBIDDEN", "membership to be one of"},
		"invite, too large":      {"10", bob, large, 413, "M_BAD_JSON", "65536 bytes"},
		"knock":                  {"10", state("m.room.member", alice), `{"membership":"knock"}`, 403, "M_FORBIDDEN", "knock cannot be delayed"},
		"knock before it was":    {"6", state("m.room.member", alice), `{"membership":"knock"}`, 403, "M_FORBIDDEN", ""},
		"invite 1":               {"10", state("m.room.member", "@bob:localhost"), `{"membership":"invite","third_party_invite":1}`, 400, "M_BAD_JSON", ""},
		"name 1":                 {"10", state("m.room.member", alice), `{"membership":"leave","displayname":1}`, 400, "M_BAD_JSON", "strings and objects"},
		"pseudo IDs, name 1":     {pseudoIDs, state("m.room.member", alice), `{"membership":"join","displayname":1}`, 400, "M_BAD_JSON", ""},
		"pseudo IDs, key's name": {pseudoIDs, state("m.room.member", "key"), `{"membership":"leave","reason":{}}`, 400, "M_BAD_JSON", ""},
		"pseudo IDs, mapping":    {pseudoIDs, state("m.room.member", alice), `{"membership":"join","mxid_mapping":{}}`, 400, "M_BAD_JSON", "mxid_mapping"},
		"pseudo IDs, invite":     {pseudoIDs, bob, `{"membership":"invite"}`, 403, "M_FORBIDDEN", "invitation"},
		"mapping 1":              {"10", state("m.room.member", alice), `{"membership":"join","mxid_mapping":1}`, 400, "M_BAD_JSON", ""},
		"levels of users 1":      {"10", state("m.room.power_levels", ""), `{"users":1}`, 403, "M_FORBIDDEN", "integers in users"},
		"pseudo IDs, users 1":    {pseudoIDs, state("m.room.power_levels", ""), `{"users":1}`, 400, "M_BAD_JSON", "integers in users"},
		"pseudo IDs, users null": {pseudoIDs, state("m.room.power_levels", ""), `{"users":null}`, 400, "M_BAD_JSON", "integers in users"},
		"pseudo IDs, bad key":    {pseudoIDs, state("m", "@bob"), `{}`, 400, "M_BAD_JSON", "type, state key and content"},
		"level is a string":      {"10", state("m.room.power_levels", ""), `{"ban":"50"}`, 403, "M_FORBIDDEN", ""},
		"level is a word":        {"5", state("m.room.power_levels", ""), `{"ban":"much"}`, 403, "M_FORBIDDEN", ""},
		"level of nobody":        {"10", state("m.room.power_levels", ""), `{"users":{"bob":1}}`, 403, "M_FORBIDDEN", ""},
		"alias 1":                {"10", state("m.room.canonical_alias", ""), `{"alias":1}`, 400, "M_BAD_JSON", "string in alias"},
		"alternative aliases 1":  {"10", state("m.room.canonical_alias", ""), `{"alt_aliases":1}`, 400, "M_BAD_JSON", "string in alias"},
		"alias of no form":       {"10", state("m.room.canonical_alias", ""), `{"alias":"x"}`, 400, "M_INVALID_PARAM", "string in alias"},
		"aliases":                {"10", state("m.room.aliases", "elsewhere"), `{}`, 403, "M_FORBIDDEN", "server's name"},
		"aliases, no state":      {"10", target{roomID: "!room:localhost", eventType: "m.room.aliases"}, `{}`, 400, "M_BAD_JSON", "server's name"},
		"somebody else's key":    {"10", state("m.call.member", "@bob:localhost"), `{}`, 403, "M_FORBIDDEN", ""},
		"redaction":              {"10", target{roomID: "!room:localhost", eventType: "m.room.redaction"}, `{"redacts":"$x"}`, 403, "M_FORBIDDEN", "this version"},
		"redaction of old":       {"1", target{roomID: "!room:localhost", eventType: "m.room.redaction"}, `{"redacts":"$x:y"}`, 403, "M_FORBIDDEN", ""},
		"tombstone of itself":    {"10", state("m.room.tombstone", ""), `{"replacement_room":"!room:localhost"}`, 400, "M_INVALID_PARAM", "replacement_room"},
		"tombstone with two":     {"10", state("m.room.tombstone", ""), `{"replacement_room":"!x:y","replacement_room":"!room:localhost"}`, 400, "M_INVALID_PARAM", "replacement_room"},
	} {
		t.Run(name, func(t *testing.T) {
			err := check(test.version, test.to, test.content, time.Time{})
			var refused *webapi.RequestError
			require.ErrorAs(t, err, &refused)
			require.Equal(t, test.code, refused.Code, refused)
			require.Equal(t, test.errcode, string(refused.ErrCode), refused)
			require.Contains(t, refused.Err, test.text)
			require.NotEmpty(t, refused.Err)
		})
	}
	require.NoError(t, check("10", message, `{}`, time.UnixMilli(0)))
	require.NoError(t, check("10", state("m.room.tombstone", ""), `{"replacement_room":"!room:localhost","replacement_room":"!x:y"}`, time.Time{}))
	// Dendrite takes members with any state key. Some are user IDs that older versions of the specification allow.
	for _, key := range []string{"bob", "@bob", "@é1:localhost", "@a b:localhost", "@:localhost", "@x:a_b"} {
		for _, version := range []gomatrixserverlib.RoomVersion{"1", "6", "10", "11"} {
			for _, membership := range []string{"ban", "leave", "invite"} {
				require.NoError(t, check(version, state("m.room.member", key), `{"membership":"`+membership+`"}`, time.Time{}), key)
			}
		}
	}
	require.NoError(t, check("11", target{roomID: "!room:localhost", eventType: "m.room.redaction"}, `{"redacts":"$x"}`, time.Time{}))
}

// FuzzWellFormed checks that every event is either accepted or refused with a Matrix error of status 4xx, never 5xx. Of an accepted event,
// the closing event can be built too.
func FuzzWellFormed(f *testing.F) {
	for _, content := range []string{
		`{}`, `{"membership":"join"}`, `{"membership":1}`, `{"users":1}`, `{"users":{"@bob:localhost":50},"events":{"m":"5"}}`,
		`{"alias":"#a:localhost","alt_aliases":[1]}`, invite("@bob:localhost", "token", signature), `{"membership":"join","mxid_mapping":{"user_id":"bob"}}`,
		`{"a":[1e3,-0,0.5,9007199254740993]}`, `{"m.relates_to":1,"m.will_expire":30}`, `{"redacts":1}`, `{"replacement_room":[]}`,
	} {
		for i, eventType := range []string{
			"m.room.member", "m.room.power_levels", "m.room.canonical_alias", "m.room.aliases", "m.room.redaction", "m.room.create",
			"m.room.third_party_invite", "m.room.join_rules", "m.room.tombstone", "m.call.member",
		} {
			f.Add(uint8(i), eventType, alice, i%3 > 0, content, int64(i-1))
		}
	}
	var versions []gomatrixserverlib.RoomVersion
	for version := range gomatrixserverlib.RoomVersions() {
		versions = append(versions, version)
	}
	slices.Sort(versions)
	f.Fuzz(func(t *testing.T, version uint8, eventType, key string, isState bool, content string, ms int64) {
		to := target{roomID: "!room:localhost", eventType: eventType}
		if isState {
			to.stateKey = &key
		}
		a := &API{cfg: Config{MaxDuration: time.Hour}, dendrite: &config.ClientAPI{}}
		err := checkNames(to)
		var d expiration.Delayed
		var sent []byte
		if err == nil {
			req := httptest.NewRequest(http.MethodPut, fmt.Sprintf("/?ts=%d", ms), nil)
			service := &userapi.Device{UserID: alice, AccountType: userapi.AccountTypeAppService}
			d, sent, err = a.parseDelayed(req, service, []byte(content))
		}
		var built gomatrixserverlib.PDU
		roomVersion := versions[int(version)%len(versions)]
		if err == nil {
			built, err = a.checkSendable(t.Context(), &userapi.Device{UserID: alice}, roomVersion, to, sent, d.Timestamp)
		}
		if err == nil {
			err = checkSize(built, to, true)
		}
		if err != nil {
			res := errorResponse(httptest.NewRequest(http.MethodPut, "/", nil), err)
			require.GreaterOrEqual(t, res.Code, 400, err)
			require.Less(t, res.Code, 500, err)
			answer, err := json.Marshal(res.JSON)
			require.NoError(t, err)
			require.NotEmpty(t, gjson.GetBytes(answer, "errcode").Str)
			return
		}
		require.LessOrEqual(t, len(built.JSON()), eventsize.Max)
		require.Equal(t, eventType, built.Type())
		var fields map[string]json.RawMessage
		require.NoError(t, json.Unmarshal(built.Content(), &fields))
		fields["m.will_expire"] = json.RawMessage(`"expired"`)
		fields["m.relates_to"] = json.RawMessage(`{"event_id":"` + built.EventID() + `","rel_type":"m.expire.relationship"}`)
		closing, err := json.Marshal(fields)
		require.NoError(t, err)
		_, err = a.checkSendable(t.Context(), &userapi.Device{UserID: alice}, roomVersion, to, closing, time.UnixMilli(1_700_000_000_000))
		require.NoError(t, err)
	})
}
