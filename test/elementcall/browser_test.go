//go:build all

package elementcall

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// browser is one user's Chromium, and the script that controls it.
type browser struct {
	name string
	// user is the ID of the logged-in user, known after joining a call.
	user     string
	stack    *stack
	profile  string
	chromium *exec.Cmd
	script   io.Writer
	answers  chan answer
}

// answer is the script's answer to a command.
type answer struct {
	Result json.RawMessage `json:"result"`
	Error  string          `json:"error"`
	at     time.Time
}

// newBrowser starts a browser with an empty profile.
func (s *stack) newBrowser(t *testing.T, name string) *browser {
	t.Helper()
	b := &browser{name: name, stack: s, profile: t.TempDir()}
	b.start(t)
	return b
}

// start starts the browser. A second start uses the same profile.
func (b *browser) start(t *testing.T) {
	t.Helper()
	port := filepath.Join(b.profile, "DevToolsActivePort")
	require.NoError(t, os.RemoveAll(port))
	b.chromium = exec.Command("chromium",
		"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
		"--disable-breakpad", "--no-first-run", "--hide-scrollbars", "--mute-audio", "--window-size=1000,860",
		"--force-prefers-reduced-motion",
		"--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream=fps=5", "--allow-loopback-in-peer-connection",
		// The browser resolves all names of example.com to the reverse proxy, and no others.
		"--host-resolver-rules=MAP *.example.com:443 "+b.stack.https+", MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
		"--ignore-certificate-errors", "--remote-debugging-port=0", "--user-data-dir="+b.profile, "about:blank")
	// Chromium has a process group of its own, so that all its processes can be killed at once.
	b.chromium.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	log := b.log(t, "chromium")
	b.chromium.Stdout, b.chromium.Stderr = log, log
	require.NoError(t, b.chromium.Start())
	chromium := b.chromium
	t.Cleanup(func() {
		_ = syscall.Kill(-chromium.Process.Pid, syscall.SIGKILL)
		_ = chromium.Wait()
	})
	var endpoint string
	await(t, "the browser of "+b.name, func() bool {
		lines, err := os.ReadFile(port)
		if number, path, found := strings.Cut(strings.TrimSpace(string(lines)), "\n"); err == nil && found {
			endpoint = "ws://127.0.0.1:" + number + path
		}
		return endpoint != ""
	})
	b.drive(t, endpoint)
}

// log opens a file for the output of one of the programs.
func (b *browser) log(t *testing.T, program string) *os.File {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(b.stack.dir, b.name+"-"+program+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	t.Cleanup(func() { _ = log.Close() })
	return log
}

// drive starts the script, see js/driver.mjs.
func (b *browser) drive(t *testing.T, endpoint string) {
	t.Helper()
	cmd := exec.Command("node", "driver.mjs", endpoint, filepath.Join(b.stack.dir, "failure-"+b.name+".png"))
	cmd.Dir, cmd.Stderr = filepath.Join(programs.dir, "js"), b.log(t, "console")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	answers := make(chan answer, 1)
	b.script, b.answers = stdin, answers
	go func() {
		defer close(answers)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			a := answer{at: time.Now()}
			if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
				a.Error = fmt.Sprintf("%s: %s", err, lines.Bytes())
			}
			answers <- a
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		for range answers { // read to the end before Wait is called
		}
		_ = cmd.Wait()
	})
}

// do runs a command of the script, and returns when it was done. The command's result is stored in result, unless that is nil.
func (b *browser) do(t *testing.T, result any, command string, args ...any) time.Time {
	t.Helper()
	line, err := json.Marshal(append([]any{command}, args...))
	require.NoError(t, err)
	_, err = fmt.Fprintf(b.script, "%s\n", line)
	require.NoError(t, err)
	select {
	case a, running := <-b.answers:
		require.True(t, running, "the script of %s ended", b.name)
		require.Empty(t, a.Error, "%s: %s", b.name, command)
		if result != nil {
			require.NoError(t, json.Unmarshal(a.Result, result))
		}
		return a.at
	case <-time.After(soon):
		t.Fatalf("%s: %s did not end", b.name, command)
		return time.Time{}
	}
}

// picture saves a screenshot.
func (b *browser) picture(t *testing.T, what string) {
	t.Helper()
	b.do(t, nil, "picture", filepath.Join(b.stack.dir, what+"-"+b.name+".png"))
}

// crash kills the browser, and returns the time. First it waits until the browser has written the login to disk, so that the user is still
// logged in after the next start.
func (b *browser) crash(t *testing.T) time.Time {
	t.Helper()
	await(t, "who is logged in, on the disk", func() bool {
		logs, err := filepath.Glob(filepath.Join(b.profile, "Default", "Local Storage", "leveldb", "*.log"))
		require.NoError(t, err)
		return slices.ContainsFunc(logs, func(name string) bool {
			written, _ := os.ReadFile(name)
			return bytes.Contains(written, []byte("matrix-auth-store"))
		})
	})
	now := time.Now()
	require.NoError(t, syscall.Kill(-b.chromium.Process.Pid, syscall.SIGKILL))
	_ = b.chromium.Wait()
	return now
}

// freeze stops the browser for some time. Meanwhile it neither sends nor takes anything.
func (b *browser) freeze(t *testing.T, long time.Duration) {
	t.Helper()
	signal := func(s syscall.Signal) { require.NoError(t, syscall.Kill(-b.chromium.Process.Pid, s)) }
	signal(syscall.SIGSTOP)
	time.Sleep(long)
	signal(syscall.SIGCONT)
}
