package roomserver

import (
	"strings"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/eventsize"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

func TestClosingContent(t *testing.T) {
	got, err := closingContent([]byte(`{"a":[1,{"b":"<"}],"m.relates_to":{"x":1},"m.will_expire":"running"}`), "$original", expiration.Ended)
	require.NoError(t, err)
	require.JSONEq(t, `{"a":[1,{"b":"<"}],"m.relates_to":{"event_id":"$original","rel_type":"m.expire.relationship"},"m.will_expire":"ended"}`, string(got))
	_, err = closingContent([]byte(`[]`), "$original", expiration.Ended)
	require.Error(t, err)
}

func TestIsRunning(t *testing.T) {
	require.True(t, isRunning(newEvent(t, "", `{"m.will_expire":"running"}`)))
	for _, content := range []string{`{}`, `{"m.will_expire":"ended"}`, `{"m.will_expire":5}`, `{"m.will_expire":{"a":"running"}}`} {
		require.False(t, isRunning(newEvent(t, "", content)), content)
	}
}

// The closing event of the largest accepted event fits, with as many references as Dendrite ever makes.
func TestClosable(t *testing.T) {
	event := func(size int) *types.HeaderedEvent {
		return newEvent(t, `,"state_key":"key"`, `{"m.will_expire":"running","x":"`+strings.Repeat("<", size)+`"}`)
	}
	largest := 0
	for size := 1 << 16; size > 0; size >>= 1 {
		if closable(event(largest + size)) {
			largest += size
		}
	}
	accepted := event(largest)
	content, err := closingContent(accepted.Content(), accepted.EventID(), expiration.Expired)
	require.NoError(t, err)
	content, err = gomatrixserverlib.CanonicalJSON(content)
	require.NoError(t, err)
	references := strings.Repeat(`"`+reference+`",`, eventsize.MaxPrevEvents+eventsize.MaxAuthEvents-3)
	closing := len(accepted.JSON()) - len(accepted.Content()) + len(content) + len(references) + len("9223372036854775807")
	require.LessOrEqual(t, closing, eventsize.Max)
	require.Greater(t, closing, eventsize.Max-10, "no more is refused than needs be")
}

func TestRunningContent(t *testing.T) {
	got, err := runningContent([]byte(`{"a":[1,{"b":"<"}],"m.will_expire":30}`))
	require.NoError(t, err)
	require.JSONEq(t, `{"a":[1,{"b":"<"}],"m.will_expire":"running"}`, string(got))
	_, err = runningContent([]byte(`[]`))
	require.Error(t, err)
}
