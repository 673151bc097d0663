//go:build all

package clients

import (
	"bufio"
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

//go:embed js
var scripts embed.FS

var errNoNode = errors.New("no Node.js or npm found: install them (Debian: apt-get install nodejs npm)")

// sdk is a folder with the participant's script and the SDK that it needs. All tests share it.
var sdk struct {
	once sync.Once
	dir  string
	err  error
}

// installSDK installs the SDK from npm's registry, in the versions of js/package-lock.json.
func installSDK(dir string) error {
	for _, program := range []string{"node", "npm"} {
		if _, err := exec.LookPath(program); err != nil {
			return errNoNode
		}
	}
	if err := os.CopyFS(dir, scripts); err != nil {
		return err
	}
	npm := exec.Command("npm", "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund")
	npm.Dir = filepath.Join(dir, "js")
	if out, err := npm.CombinedOutput(); err != nil {
		return fmt.Errorf("npm ci: %w\n%s", err, out)
	}
	return nil
}

// withSDK returns the folder of the script. Without Node.js the test is skipped. In CI, where the environment variable CI is set, it
// fails.
func withSDK(t *testing.T) string {
	t.Helper()
	sdk.once.Do(func() { sdk.err = installSDK(sdk.dir) })
	switch {
	case errors.Is(sdk.err, errNoNode) && os.Getenv("CI") == "":
		t.Skipf("NOT TESTED WITH MATRIX-JS-SDK: %s", sdk.err)
	case sdk.err != nil:
		t.Fatalf("installing matrix-js-sdk: %s", sdk.err)
	}
	return filepath.Join(sdk.dir, "js")
}

// participant is a process that takes part in a call, see js/participant.mjs.
type participant struct {
	*script
	user string
	// These are the lines of its output, by kind. An error goes to all of them.
	members, requests, syncs chan line
}

// line is one line of a participant's output.
type line struct {
	Members []string `json:"members"`
	Request string   `json:"request"`
	Status  int      `json:"status"`
	Errcode string   `json:"errcode"`
	// Delay, in milliseconds, DelayID and StateKey are those of a delayed event that was scheduled.
	Delay    int64  `json:"delay"`
	DelayID  string `json:"delayId"`
	StateKey string `json:"stateKey"`
	// RetryAfter is the header Retry-After, in seconds.
	RetryAfter int    `json:"retryAfter"`
	Sync       string `json:"sync"`
	Error      string `json:"error"`
	// at is the time when the line was read.
	at time.Time
}

// script is a running script of the folder js.
type script struct {
	cmd    *exec.Cmd
	stdin  io.Writer
	stdout io.Reader
	log    bytes.Buffer
}

// run starts a script, which logs in as a user. The options are added to those of the login. done is called before the script's end is
// awaited, and must return when its output has ended.
func run(t *testing.T, name string, user *homeserver.Client, options homeserver.JSON, done func()) *script {
	t.Helper()
	all := homeserver.JSON{"baseUrl": user.URL, "user": user.UserID, "password": homeserver.Password}
	maps.Copy(all, options)
	arg, err := json.Marshal(all)
	require.NoError(t, err)
	s := &script{cmd: exec.Command("node", name, string(arg))}
	s.cmd.Dir, s.cmd.Stderr = withSDK(t), &s.log
	s.stdin, err = s.cmd.StdinPipe()
	require.NoError(t, err)
	s.stdout, err = s.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		done() // the output is read to the end before Wait is called
		_ = s.cmd.Wait()
		if t.Failed() {
			t.Logf("the log of %s:\n%s", user.UserID, &s.log)
		}
	})
	return s
}

// join starts a participant, which joins the call of a room.
func join(t *testing.T, user *homeserver.Client, roomID string, config homeserver.JSON) *participant {
	t.Helper()
	p := &participant{
		user: user.UserID, members: make(chan line, 1000), requests: make(chan line, 1000), syncs: make(chan line, 1000),
	}
	p.script = run(t, "participant.mjs", user, homeserver.JSON{"roomId": roomID, "config": config}, func() {
		for range p.requests {
		}
	})
	go p.read(p.stdout)
	return p
}

// read reads the participant's output until it ends.
func (p *participant) read(stdout io.Reader) {
	all := []chan line{p.members, p.requests, p.syncs}
	for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
		l := line{at: time.Now()}
		if err := json.Unmarshal(scanner.Bytes(), &l); err != nil {
			l.Error = fmt.Sprintf("%s: %s", err, scanner.Bytes())
		}
		switch {
		case l.Members != nil:
			p.members <- l
		case l.Request != "":
			p.requests <- l
		case l.Sync != "":
			p.syncs <- l
		default:
			for _, lines := range all {
				lines <- l
			}
		}
	}
	for _, lines := range all {
		close(lines)
	}
}

// await returns the next line that matches, and discards the lines before it.
func (p *participant) await(t *testing.T, lines <-chan line, what string, matches func(line) bool) line {
	t.Helper()
	for deadline := time.After(soon); ; {
		select {
		case l, running := <-lines:
			require.True(t, running, "%s ended, and %s did not come", p.user, what)
			require.Empty(t, l.Error, p.user)
			if matches(l) {
				return l
			}
		case <-deadline:
			t.Fatalf("%s did not see: %s", p.user, what)
		}
	}
}

// change waits for the next change of the call's members.
func (p *participant) change(t *testing.T) line {
	t.Helper()
	return p.await(t, p.members, "a change in the call", func(line) bool { return true })
}

// sees waits until exactly these users are in the call.
func (p *participant) sees(t *testing.T, users ...string) {
	t.Helper()
	p.await(t, p.members, fmt.Sprint(users), func(l line) bool { return slices.Equal(l.Members, users) })
}

// does waits for the answers to the participant's next requests, and requires that they are these. A request is written as "restart 200". It
// returns the answers.
func (p *participant) does(t *testing.T, requests ...string) (answers []line) {
	t.Helper()
	for _, request := range requests {
		answer := p.await(t, p.requests, request, func(line) bool { return true })
		require.Equal(t, request, fmt.Sprintf("%s %d", answer.Request, answer.Status), "%s: %s", p.user, answer.Errcode)
		answers = append(answers, answer)
	}
	return answers
}

// manages waits for a successful request about a delayed event.
func (p *participant) manages(t *testing.T, request string, since time.Time) {
	t.Helper()
	p.await(t, p.requests, request, func(l line) bool { return l.Request == request && l.Status == 200 && l.at.After(since) })
}

// tell sends a command to the participant, and returns the time.
func (p *participant) tell(t *testing.T, command string) time.Time {
	t.Helper()
	now := time.Now()
	_, err := fmt.Fprintln(p.stdin, command)
	require.NoError(t, err)
	return now
}

// signal sends a signal to the participant's process, and returns the time.
func (p *participant) signal(t *testing.T, signal syscall.Signal) time.Time {
	t.Helper()
	now := time.Now()
	require.NoError(t, p.cmd.Process.Signal(signal))
	return now
}
