package clientapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// expireKey is the field that makes an event an expiring one.
const expireKey = "m.will_expire"

var (
	expireKeyBytes = []byte(expireKey)
	// unicodeEscape begins an escape, which can spell any key differently.
	unicodeEscape = []byte(`\u`)
	runningJSON   = json.RawMessage(`"` + expiration.Running + `"`)
)

// fieldError is a bad value of m.will_expire. Its text is for the client.
type fieldError struct{ max time.Duration }

func (e *fieldError) Error() string {
	return fmt.Sprintf("%s must be a whole number of seconds from 1 to %d, or %q or %q",
		expireKey, e.max/time.Second, expiration.Expired, expiration.Ended)
}

// parseContent looks for m.will_expire in the content of a request. If the request asks for an expiring event, parseContent returns its
// duration and the content that it is sent with. Otherwise the duration is 0, and the content is returned unchanged unless the field is
// bad. Content that is not JSON is returned unchanged too, because Dendrite answers it with an error.
func parseContent(content []byte, maxDuration time.Duration) ([]byte, time.Duration, error) {
	if !bytes.Contains(content, expireKeyBytes) && !bytes.Contains(content, unicodeEscape) {
		return content, 0, nil
	}
	var fields map[string]json.RawMessage
	if !utf8.Valid(content) || json.Unmarshal(content, &fields) != nil {
		return content, 0, nil
	}
	value, ok := fields[expireKey]
	if !ok {
		return content, 0, nil
	}
	var outcome expiration.Outcome
	if json.Unmarshal(value, &outcome) == nil && (outcome == expiration.Expired || outcome == expiration.Ended) {
		return content, 0, nil
	}
	seconds, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || seconds < 1 || seconds > int64(maxDuration/time.Second) {
		return nil, 0, &fieldError{maxDuration}
	}
	fields[expireKey] = runningJSON
	if content, err = json.Marshal(fields); err != nil {
		return nil, 0, err
	}
	return content, time.Duration(seconds) * time.Second, nil
}

// lastField returns a field of a JSON object. If the key is repeated, the last value counts, as in Dendrite, which decodes into maps and
// structs.
func lastField(object []byte, key string) (last gjson.Result) {
	gjson.ParseBytes(object).ForEach(func(k, value gjson.Result) bool {
		if k.Str == key {
			last = value
		}
		return true
	})
	return last
}
