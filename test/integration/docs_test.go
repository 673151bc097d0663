package integration

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

var (
	shellBlock = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")
	// shownAnswer matches JSON in comments after a command. Its further lines are indented.
	shownAnswer = regexp.MustCompile(`(?m)^# \{.*(?:\n#   .*)*`)
)

// The commands in docs/delayed-events.md work as pasted, and have the answers that the document shows.
func TestDelayedEventsDoc(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/delayed-events.md")
	require.NoError(t, err)
	testCommands(t, string(doc))
}

// The same for "Use it" in README.md, from the login on. The commands before it start the server and create the user.
func TestReadme(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, use, found := strings.Cut(string(doc), "\nLog in, and make a room.")
	require.True(t, found)
	use, _, found = strings.Cut(use, "\nIs everything there")
	require.True(t, found)
	testCommands(t, use)
}

// testCommands runs the commands of a document on a server with the user of the README. It compares the answers with those in the
// comments.
func testCommands(t *testing.T, doc string) {
	s := start(t, homeserver.Config{})
	res, err := s.Anonymous().Do(t.Context(), http.MethodPost, "/_matrix/client/v3/register",
		JSON{"username": "alice", "password": "a-long-password", "auth": JSON{"type": "m.login.dummy"}})
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.Code, res)

	var script, shown strings.Builder
	for _, block := range shellBlock.FindAllStringSubmatch(doc, -1) {
		script.WriteString(block[1])
	}
	for _, answer := range shownAnswer.FindAllString(script.String(), -1) {
		shown.WriteString(strings.ReplaceAll("\n"+answer, "\n#", "\n"))
	}
	bash := exec.CommandContext(t.Context(), "bash", "-eu", "-c", script.String())
	bash.Env = append(os.Environ(), "SERVER="+s.URL)
	var complaints bytes.Buffer
	bash.Stderr = &complaints
	output, err := bash.Output()
	require.NoError(t, err, "%s", complaints.String())

	promised, given := objects(t, shown.String()), objects(t, string(output))
	require.NotEmpty(t, promised)
	require.Len(t, given, len(promised), "%s", output)
	for i := range promised {
		require.True(t, isLike(promised[i], given[i]), "shown:  %v\nanswer: %v", promised[i], given[i])
	}
}

// objects reads a sequence of JSON objects.
func objects(t *testing.T, text string) (all []any) {
	t.Helper()
	for decoder := json.NewDecoder(strings.NewReader(text)); decoder.More(); {
		var object JSON
		require.NoError(t, decoder.Decode(&object), "%s", text)
		all = append(all, object)
	}
	return all
}

// isLike reports whether an answer matches the shown one. Any number matches a number, and anything matches "…".
func isLike(shown, given any) bool {
	switch shown := shown.(type) {
	case JSON:
		object, ok := given.(JSON)
		_, more := shown["…"]
		if !ok || !more && len(object) != len(shown) {
			return false
		}
		for key, value := range shown {
			if field, ok := object[key]; key != "…" && (!ok || !isLike(value, field)) {
				return false
			}
		}
		return true
	case []any:
		list, ok := given.([]any)
		if !ok || len(list) != len(shown) {
			return false
		}
		for i := range shown {
			if !isLike(shown[i], list[i]) {
				return false
			}
		}
		return true
	case string:
		text, ok := given.(string)
		return ok && (strings.Contains(shown, "…") || shown == text)
	case float64:
		_, ok := given.(float64)
		return ok
	}
	return shown == given
}
