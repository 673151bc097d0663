//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// holdInterval is how often a goroutine on hold checks whether it may go on.
const holdInterval = 5 * time.Millisecond

var (
	mu     sync.Mutex // guards passed
	passed = map[Point]int{}
)

// Pass is a point at which the process may crash, wait or panic.
func Pass(p Point) { _ = Fail(p) }

// Fail is a point at which an operation may also fail.
func Fail(p Point) error {
	mu.Lock()
	passed[p]++
	times := passed[p]
	mu.Unlock()
	for {
		what := read(p)
		if len(what) == 0 {
			return nil
		}
		switch what[0] {
		case "fail":
			return fmt.Errorf("failpoint %s", p)
		case "panic":
			panic(fmt.Sprintf("failpoint %s", p))
		case "hold":
			time.Sleep(holdInterval)
			continue
		case "kill":
			if len(what) > 1 && what[1] == strconv.Itoa(times) {
				kill(what[2:])
			}
		}
		return nil
	}
}

// WallClock is the time of day, which a test can set.
func WallClock() time.Time {
	now := time.Now().Round(0)
	if what := read(Wall); len(what) > 1 && what[0] == "step" {
		step, err := time.ParseDuration(what[1])
		if err != nil {
			panic(err)
		}
		return now.Add(step)
	}
	return now
}

// read returns what is to happen at a point now.
func read(p Point) []string {
	data, err := os.ReadFile(os.Getenv(File))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(data)) {
		if words := strings.Fields(line); len(words) > 1 && words[0] == string(p) {
			return words[1:]
		}
	}
	return nil
}

// kill ends the process, at once or after the given time.
func kill(after []string) {
	if len(after) == 0 {
		end()
	}
	delay, err := time.ParseDuration(after[0])
	if err != nil {
		panic(err)
	}
	time.AfterFunc(delay, end)
}

// end does not return, because the process must do nothing more.
func end() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}
