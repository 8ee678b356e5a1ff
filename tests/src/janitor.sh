# Removes everything of one fleet: processes, mounts, network, cgroups, directories.
#   janitor.sh NAME DIRECTORY
# It first waits for its standard input to end, which also happens when the fleet's process is killed. A line "keep"
# on it means that the fleet shall stay.
set -eu
name=$1
dir=$2
# Everything below kills and removes by this name: an empty or a general one would match the whole machine.
case $name in
haul-[0-9a-f][0-9a-f][0-9a-f][0-9a-f]) ;;
*) echo "\"$name\" is not the name of a fleet: nothing is removed" && exit 2 ;;
esac
case $dir in
/*/"$name") ;;
*) echo "\"$dir\" is not the directory of $name: nothing is removed" && exit 2 ;;
esac
set +e
while read -r word; do
    [ "$word" != keep ] || exit 0
done

# The fleet's own processes carry its name in their environment, the containers' are in cgroups below its name. Zombies
# are dead already; when they are reaped depends on the machine's init.
pids() {
    {
        grep -lsz "^HAULAGE_FLEET=$name\$" /proc/[0-9]*/environ
        grep -ls "[:/]$name\(\.slice\)\?\(/\|\$\)" /proc/[0-9]*/cgroup
        # CRIU writes its title over its environment, and is in no cgroup of the fleet; its files are the fleet's.
        grep -lsx criu /proc/[0-9]*/comm | while read -r comm; do
            ! ls -l "${comm%comm}fd" 2>/dev/null | grep -q -e "-> $dir/" || echo "$comm"
        done
    } | sed 's,[^/]*$,status,' | xargs -r grep -Ls '^State:.Z' | sed 's,/proc/\([0-9]*\)/.*,\1,' | grep -vx "$$"
}
cgroups() {
    find /sys/fs/cgroup -depth -type d \( -path "*/$name" -o -path "*/$name/*" -o -path "*/$name.slice" \
        -o -path "*/$name.slice/*" \) 2>/dev/null
}

# One that is just being started by another may be seen by nothing of this for a moment.
round=0
unseen=0
while [ "$round" -lt 200 ] && [ "$unseen" -lt 3 ]; do
    found=$(pids)
    if [ -n "$found" ]; then
        unseen=0
        kill -KILL $found 2>/dev/null
    else
        unseen=$((unseen + 1))
        sleep 0.05
    fi
    # A frozen process cannot die (cgroup v1), so whatever was left frozen is thawed.
    cgroups | while read -r group; do
        [ ! -e "$group/freezer.state" ] || echo THAWED >"$group/freezer.state"
        [ ! -e "$group/cgroup.freeze" ] || echo 0 >"$group/cgroup.freeze"
    done 2>/dev/null
    sleep 0.02
    round=$((round + 1))
done
[ -z "$(pids)" ] || echo "processes are left: $(pids | tr '\n' ' ')"

for netns in /run/netns/"$name"-*; do
    [ ! -e "$netns" ] || ip netns delete "${netns##*/}" || echo "network namespace $netns is left"
done
# A host's namespace without its name lives on while a TCP connection that was cut in it still tries to say goodbye, for
# a minute or two. No link is left of it: the other ends are in the switch, which has no connections. This one would go
# with the switch too, but only some moments later, and perhaps while it is looked at.
link=/sys/class/net/$name
[ ! -e "$link" ] || ip link delete "$name" 2>/dev/null || [ ! -e "$link" ] || echo "link $name is left"

awk -v dir="$dir" '$5 == dir || index($5, dir "/") == 1 { print $5 }' /proc/self/mountinfo | sort -r |
    while read -r mount; do umount "$mount" || echo "mount $mount is left"; done

# Those that systemd has made are systemd's to remove, and the slice of all fleets with the last of them.
slices=/sys/fs/cgroup/haul.slice
[ ! -e "$slices/$name.slice" ] || systemctl stop "$name.slice" || echo "slice $name.slice is left"
[ ! -e "$slices" ] || [ -n "$(find "$slices" -mindepth 1 -type d)" ] || systemctl stop haul.slice

# A cgroup can stay busy for some milliseconds after its last process is gone.
round=0
while [ "$round" -lt 100 ]; do
    [ -n "$(cgroups)" ] || break
    cgroups | while read -r group; do rmdir "$group" 2>/dev/null; done
    round=$((round + 1))
    sleep 0.02
done
[ -z "$(cgroups)" ] || echo "cgroups are left: $(cgroups | tr '\n' ' ')"

rm -rf --one-file-system "$dir" || echo "directory $dir is left"
